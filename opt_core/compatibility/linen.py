"""Parameters by linen's names, as `transformers`' Flax models have them.

They are a nested dict (`["model"]["decoder"]["layers"]["0"]["fc1"]["kernel"]`), kernels [in, out].
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np

from opt_core.compatibility.notices import notice
from opt_core.config import OPTConfig
from opt_core.dialects import LINEN
from opt_core.errors import ArgumentError, InputError, UnsupportedError
from opt_core.params import Head, ParamSpec, param_specs

Tree = Mapping[str, Any]
_NO_LOADER = "use from_pretrained, which reads flax_model.msgpack too"

REFUSED: Mapping[str, str] = {
    "module_class": "no linen modules; the model is an nnx.Module, called with params=",
    "key": "a model keeps no key; seed= makes its weights, prng_key= and dropout_rng= the rest",
    "load_flax_weights": _NO_LOADER,
    "load_flax_sharded_weights": _NO_LOADER,
    "_cast_floating_to": "use to_bf16, to_fp16 or to_fp32",
    "to": "put the parameters where they shall be by jax.device_put, in another type by to_bf16; "
    "transformers' pipelines take the models of opt_torch",
}
"""Attributes of those models that there are not, and advice."""


def make_tree(
    config: OPTConfig,
    head: Head,
    values: Callable[[ParamSpec], Any],
    transpose: Callable[[Any], Any],
) -> dict[str, Any]:
    """Values by linen's names.

    Args:
        config: The model's configuration.
        head: The model's head.
        values: Gives a parameter's; those of a kernel as [out, in].
        transpose: Turns a kernel round.
    """
    tree: dict[str, Any] = {}
    for spec in param_specs(config, head):
        value = transpose(values(spec)) if _is_kernel(spec) else values(spec)
        put(tree, tuple(LINEN.path(spec, head)), value)
    return tree


def read_tree(
    config: OPTConfig, head: Head, params: Any, transpose: Callable[[Any], Any]
) -> dict[str, Any]:
    """Arrays in the canonical layout by their names, of a tree of linen's names.

    Args:
        config: The model's configuration.
        head: The model's head.
        params: The tree.
        transpose: Turns a kernel round.

    Raises:
        InputError: Parameters are missing, unknown or misshapen.
    """
    if not isinstance(params, Mapping):
        raise InputError(f"params: expected a dict, received {type(params).__name__}")
    leaves = dict(flat(cast(Tree, params)))
    specs = {LINEN.path(spec, head): spec for spec in param_specs(config, head)}
    for what, names in (
        ("missing", specs.keys() - leaves.keys()), ("unknown", leaves.keys() - specs.keys())
    ):  # fmt: skip
        if names:
            first = "/".join(map(str, min(names)))
            raise InputError(f"params: {len(names)} {what}, such as {first}")
    for path, spec in specs.items():
        expected = spec.shape[::-1] if _is_kernel(spec) else spec.shape
        found = tuple(np.shape(leaves[path]))
        if found != expected:
            raise InputError(
                f"params: {'/'.join(path)}: expected shape {expected}, received {found}"
            )
    return {
        spec.name: transpose(leaves[path]) if _is_kernel(spec) else leaves[path]
        for path, spec in specs.items()
    }


def put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Puts a leaf into a tree."""
    *folders, name = path
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[name] = value


def take(params: Any, paths: list[tuple[str, ...]]) -> tuple[Any, dict[tuple[str, ...], Any]]:
    """A tree without some leaves, and these by their paths.

    Raises:
        InputError: One of them is missing.
    """
    if not paths or not isinstance(params, Mapping):
        return params, {}
    leaves = dict(flat(cast(Tree, params)))
    missing = [path for path in paths if path not in leaves]
    if missing:
        raise InputError(f"params: {len(missing)} missing, such as {'/'.join(missing[0])}")
    taken = {path: leaves.pop(path) for path in paths}
    rest: dict[str, Any] = {}
    for path, value in leaves.items():
        put(rest, path, value)
    return rest, taken


def merge_trees(first: Tree, second: Tree) -> dict[str, Any]:
    """Leaves of two trees, those of the second where both have one."""
    merged = dict(first)
    for name, value in second.items():
        is_folder = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge_trees(merged[name], cast(Tree, value)) if is_folder else value
    return merged


def flat(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Leaves of any nested mapping, such as a FrozenDict, with their paths."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(cast(Tree, value), (*path, name))
        else:
            yield (*path, name), value


def check_seed(seed: Any) -> None:
    """Refuses the order of `transformers`' Flax models, whose second argument is a shape.

    Raises:
        ArgumentError: The seed is a tuple.
    """
    if isinstance(seed, tuple | list):
        raise ArgumentError(
            f"seed: expected an integer, received {seed!r}; pass input_shape=, seed= and dtype= "
            "by name"
        )


def warn_of_dtype(dtype: Any) -> None:
    """Says what `dtype=` is where a model is made, if that makes a difference.

    Args:
        dtype: As a NumPy type.
    """
    if dtype.itemsize < 4:
        notice(
            f"dtype={dtype.name}: the weights are made in it; in transformers it was the type of "
            "computation, of float32 weights: opt_flax.training has precision="
        )


def refuse_linen(name: str) -> Any:
    """`__getattr__` of a module (PEP 562): names the class to use in place of a linen module.

    Raises:
        UnsupportedError: The name of one of `transformers`' linen modules.
    """
    found = re.fullmatch(r"(FlaxOPT\w*?)(Layer|Decoder)?(Collection)?Module", name)
    if found:
        raise UnsupportedError(
            f"{name} is not supported: no linen modules; {found[1].removesuffix('OPT')}"
            f"{'' if found[1] != 'FlaxOPT' else 'OPTModel'} is an nnx.Module"
        )
    raise AttributeError(f"no attribute {name!r}")


def _is_kernel(spec: ParamSpec) -> bool:
    """Whether linen has it the other way round."""
    return spec.kind == "linear" and len(spec.shape) == 2
