"""An adapter on a model that is loaded already: beside its weights, where it can be."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.adapters.merging import EMBEDDING, AdaptedTensor, LowRank, merge_adapter
from opt_core.adapters.settings import CONFIG_FILE
from opt_core.adapters.targets import LM_HEAD
from opt_core.adapters.tensors import AdapterFolder, is_adapter, read_adapter
from opt_core.checkpoints.plan import LoadPlan
from opt_core.checkpoints.tensors import HeldTensor, LazyTensor
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError
from opt_core.hub import resolve
from opt_core.params import ParamSpec, param_specs
from opt_core.quantization import is_quantized, scheme_of

Fetch = Callable[[ParamSpec], NDArray[Any]]


@dataclass(frozen=True)
class LivePlan:
    """The changes that an adapter makes to a model.

    Attributes:
        adapter: The adapter.
        config: The model's configuration from now on.
        replaced: Parameters that get other values.
        beside: Weights that get a product beside them.
    """

    adapter: AdapterFolder
    config: OPTConfig
    replaced: list[tuple[ParamSpec, LazyTensor]]
    beside: list[tuple[ParamSpec, AdaptedTensor]]

    def values(self) -> Iterator[tuple[ParamSpec, NDArray[Any]]]:
        """The parameters that get other values, and these.

        Embedding and head come together and first: a tied head is made of the embedding as it was.
        """
        pair = [(spec, tensor) for spec, tensor in self.replaced if spec.name in _PAIR]
        yield from [(spec, tensor.read()) for spec, tensor in pair]
        for spec, tensor in self.replaced:
            if spec.name not in _PAIR:
                yield spec, tensor.read()

    def products(self) -> Iterator[tuple[ParamSpec, LowRank]]:
        """The weights that get a product beside them, and these."""
        for spec, tensor in self.beside:
            yield spec, tensor.low_rank()


_PAIR = (EMBEDDING, LM_HEAD)


def plan_live(model: Any, folder: str | PathLike[str], fetch: Fetch) -> LivePlan:
    """Reads an adapter's folder and compares it with a model, which is not changed yet.

    Args:
        model: A backend's model.
        folder: Folder or hub id.
        fetch: Gives the values of a parameter, in the canonical layout.

    Raises:
        CheckpointError: The adapter cannot be read, does not fit the model, or would change weights
            that are quantised.
    """
    path = resolve(folder)
    if not is_adapter(path):
        raise CheckpointError(f"{path}: no {CONFIG_FILE}; expected the folder of an adapter")
    adapter = read_adapter(path if path.is_dir() else path.parent)
    specs = param_specs(model.config, model.head)
    entries: list[tuple[ParamSpec, LazyTensor]] = [(s, _Live(s, fetch, path)) for s in specs]
    plan = merge_adapter(LoadPlan(model.config, entries, []), model.head, adapter)
    if plan.config.num_labels != model.config.num_labels:
        raise CheckpointError(
            f"{adapter.file} does not fit the model: score.weight: it has "
            f"{plan.config.num_labels} labels; load the model with num_labels="
            f"{plan.config.num_labels}, or the adapter's folder itself as the model"
        )
    beside = [(s, t) for s, t in plan.entries if isinstance(t, AdaptedTensor) and _can_wait(s, t)]
    apart = {spec.name for spec, _ in beside}
    renewed = _PAIR if plan.config != model.config else ()
    replaced = [
        (spec, tensor)
        for spec, tensor in plan.entries
        if spec.name not in apart and (not isinstance(tensor, _Live) or spec.name in renewed)
    ]
    if is_quantized(model) and (found := _quantized(replaced, beside)):
        raise CheckpointError(
            f"{adapter.file}: a quantised {found} cannot be changed; load the model with adapter= "
            "this folder, and quantize="
        )
    return LivePlan(adapter, plan.config, replaced, beside)


def set_config(model: Any, config: OPTConfig) -> None:
    """Gives a model, and its parts that know it, another configuration."""
    for part in (model, getattr(model, "model", model)):
        part.config = config
        part.note_structure()
    model.get_decoder().config = config


def _can_wait(spec: ParamSpec, tensor: AdaptedTensor) -> bool:
    """Whether a product can be computed beside the layer, and not only in its weight."""
    return tensor.is_beside and spec.kind == "linear" and spec.name.startswith("model.decoder.")


def _quantized(*changed: list[tuple[ParamSpec, Any]]) -> str | None:
    names = (spec.name for some in changed for spec, _ in some if scheme_of(spec, "int8"))
    return next(names, None)


@dataclass(frozen=True, eq=False)
class _Live:
    """A parameter of a model, as a tensor that is read when it is asked for."""

    spec: ParamSpec
    fetch: Fetch
    file: Path
    offset: int = 0

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        return self.spec.size * self.dtype.itemsize

    def is_same_as(self, other: LazyTensor) -> bool:
        return self is other

    def rows(self, start: int, stop: int) -> LazyTensor:
        return HeldTensor(self.name, self.read()[start:stop])

    def read(self) -> NDArray[Any]:
        return np.asarray(self.fetch(self.spec))
