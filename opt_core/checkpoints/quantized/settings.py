"""A `quantization_config`: which scheme it is of, its numbers, and what of it is not read.

It is looked at before any weight: a scheme that nobody here reads must never be taken for floating
point. Facts are those of the libraries that write such files: AutoGPTQ and GPTQModel, AutoAWQ,
bitsandbytes, compressed-tensors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from opt_core.errors import CheckpointError, ConfigError
from opt_core.json_files import read_json

SIDE_FILE = "int8_weights.safetensors"
"""The file beside our own quantised weights for what no other program keeps in eight bits."""

METHODS = ("gptq", "awq", "bitsandbytes", "compressed-tensors")
"""Values that `quant_method` may have."""

_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ kept it before configurations had a place for it."""
_GROUP = 128
"""Inputs of a group where nobody says, in AutoGPTQ and AutoAWQ."""
_GPTQ_BITS = (2, 3, 4, 8)
_NUMBERS = {
    "pack-quantized": ("int",),
    "int-quantized": ("int",),
    "naive-quantized": ("int", "float"),
    "float-quantized": ("float",),
}
_FORMATS = tuple(_NUMBERS)
_STRATEGIES = ("tensor", "channel", "group", "block")
_INSTEAD = "take the original checkpoint and pass quantize="


class GPTQ(NamedTuple):
    """GPTQ's files.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; None: all of a channel.
        is_v2: Whether zero points are stored as they are; in the first version one less.
    """

    bits: int
    group_size: int | None
    is_v2: bool


class AWQ(NamedTuple):
    """AWQ's files, in the order of its "gemm" kernels.

    Attributes:
        group_size: Inputs that share a scale; None: all of a channel.
    """

    group_size: int | None


class BitsAndBytes(NamedTuple):
    """bitsandbytes' files.

    Attributes:
        bits: 8 (LLM.int8()) or 4 (nf4 or fp4, as each weight says).
    """

    bits: int


class WeightArguments(NamedTuple):
    """How a group of layers is stored by compressed-tensors.

    Attributes:
        format: One of "pack-quantized", "int-quantized", "naive-quantized", "float-quantized".
        bits: Of a number.
        is_float: Whether numbers are float8, not integers.
        symmetric: Whether there are no zero points.
        strategy: What shares a scale: "tensor", "channel", "group" or "block".
        group_size: Inputs of a "group".
        block: Outputs and inputs of a "block".
    """

    format: str
    bits: int
    is_float: bool
    symmetric: bool
    strategy: str
    group_size: int | None = None
    block: tuple[int, int] | None = None


class CompressedTensors(NamedTuple):
    """compressed-tensors' files.

    Attributes:
        groups: The ways in which layers are stored; each layer's tensors say which is its own.
        rounds_inputs: Whether other programs round the layers' inputs or the cache too.
    """

    groups: tuple[WeightArguments, ...]
    rounds_inputs: bool


Settings = GPTQ | AWQ | BitsAndBytes | CompressedTensors


def find_settings(folder: Path) -> Settings | None:
    """The settings of the weights in a folder; None: they are not quantised.

    Raises:
        CheckpointError: Nobody here reads such weights.
    """
    path = folder / "config.json"
    try:
        values: Any = read_json(path).get("quantization_config") if path.is_file() else None
    except ConfigError:
        return None  # whoever needs the configuration says what is wrong with it
    try:
        for name, method in _FILES.items():
            if not values and (folder / name).is_file():
                path = folder / name
                values = {"quant_method": method} | read_json(path)
        return read_settings(values, f"{path}: ")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def read_settings(values: Any, where: str = "") -> Settings | None:
    """Reads a `quantization_config`.

    Args:
        values: The mapping, or None.
        where: What messages begin with: the file, a colon and a space.

    Returns:
        Its settings; None if there is none.

    Raises:
        ConfigError: A scheme, a format or a number of bits that is not read here, or a size that
            none can be.
    """
    if not values:
        return None
    where = f"{where}quantization_config: "
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}expected an object, received {values!r}")
    given = _Given(cast("Mapping[str, Any]", values), where)
    method = given.get("quant_method")
    if method is None and (given.get("load_in_8bit") or given.get("load_in_4bit")):
        method = "bitsandbytes"  # which did not name itself at first
    readers = {
        "gptq": _gptq, "awq": _awq, "bitsandbytes": _bitsandbytes,
        "compressed-tensors": _compressed_tensors,
    }  # fmt: skip
    if not isinstance(method, str) or method not in readers:
        name = "an unnamed method" if method is None else repr(method)
        raise given.refused(
            f"weights quantised by {name} are not read; expected {_either(METHODS)}"
        )
    return readers[method](given)


class _Given(NamedTuple):
    """A mapping, and what messages about it begin with."""

    values: Mapping[str, Any]
    where: str

    def get(self, *names: str) -> Any:
        """The first of several names that is there."""
        return next((v for n in names if (v := self.values.get(n)) is not None), None)

    def refused(self, reason: str) -> ConfigError:
        """The error for a scheme that is not read, with what to do in its place."""
        eight = self.get("bits", "w_bit") == 8 or self.get("load_in_8bit")
        return ConfigError(f'{self.where}{reason}; {_INSTEAD}"{"int8" if eight else "int4"}"')

    def group_size(self, *names: str) -> int | None:
        """Inputs of a group; None for -1, which is all of them."""
        size = self.get(*names)
        size = _GROUP if size is None else size
        if type(size) is not int or (size != -1 and size < 1):
            raise ConfigError(f"{self.where}{names[0]}: expected -1 or at least 1, received {size}")
        return None if size == -1 else size


def _gptq(given: _Given) -> GPTQ:
    bits = given.get("bits")
    if type(bits) is not int or bits not in _GPTQ_BITS:
        raise given.refused(f"gptq with bits={bits!r} is not read; expected 2, 3, 4 or 8")
    kind = str(given.get("checkpoint_format", "format") or "gptq").lower()
    kind = "marlin" if given.get("is_marlin_format") else kind
    if kind not in ("gptq", "gptq_v2"):
        raise given.refused(f"gptq's format {kind!r} is not read; expected 'gptq' or 'gptq_v2'")
    if (words := given.get("pack_dtype") or "int32") != "int32":
        raise given.refused(f"gptq with pack_dtype={words!r} is not read; expected 'int32'")
    dynamic: object = given.get("dynamic") or {}
    names = list(cast("Mapping[str, Any]", dynamic)) if isinstance(dynamic, Mapping) else [dynamic]
    if own := [name for name in names if not str(name).startswith("-:")]:
        raise given.refused(f"gptq with settings of its own for {own[0]!r} is not read")
    return GPTQ(bits, given.group_size("group_size"), kind == "gptq_v2")


def _awq(given: _Given) -> AWQ:
    bits = given.get("bits", "w_bit")
    if type(bits) is not int or bits != 4:
        raise given.refused(f"awq with bits={bits!r} is not read; expected 4")
    kind = str(given.get("version", "format") or "gemm").lower()
    if kind != "gemm" or given.get("backend") == "llm-awq":
        kind = given.get("backend") if kind == "gemm" else kind
        raise given.refused(f"awq's version {kind!r} is not read; expected 'gemm'")
    return AWQ(given.group_size("group_size", "q_group_size"))


def _bitsandbytes(given: _Given) -> BitsAndBytes:
    eight = given.get("load_in_8bit", "_load_in_8bit")
    four = given.get("load_in_4bit", "_load_in_4bit")
    if bool(eight) == bool(four):
        raise given.refused("bitsandbytes: expected one of load_in_8bit and load_in_4bit to be set")
    return BitsAndBytes(8 if eight else 4)


def _compressed_tensors(given: _Given) -> CompressedTensors:
    for name in ("sparsity_config", "transform_config"):
        extra = given.get(name)
        if extra and not (isinstance(extra, Mapping) and _says_nothing(extra)):
            raise given.refused(f"compressed-tensors with a {name} is not read")
    groups = given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise given.refused(f"compressed-tensors: expected config_groups, received {groups!r}")
    arguments: list[WeightArguments] = []
    rounds_inputs = given.get("kv_cache_scheme") is not None
    for name, group in cast("Mapping[str, Any]", groups).items():
        if not isinstance(group, Mapping):
            raise given.refused(f"compressed-tensors: {name}: expected an object")
        own = cast("Mapping[str, Any]", group)
        rounds_inputs |= own.get("input_activations") is not None
        if own.get("weights") is not None:
            kind = own.get("format") or given.get("format")
            arguments.append(_weight_arguments(given, name, own["weights"], kind))
    return CompressedTensors(tuple(arguments), rounds_inputs)


def _says_nothing(extra: Any) -> bool:
    return extra.get("format", "dense") == "dense" and not extra.get("config_groups")


def _weight_arguments(given: _Given, name: str, weights: Any, kind: Any) -> WeightArguments:
    if kind not in _FORMATS:
        raise given.refused(
            f"compressed-tensors' format {kind!r} is not read; expected {_either(_FORMATS)}"
        )
    if not isinstance(weights, Mapping):
        raise given.refused(f"compressed-tensors: {name}: weights: expected an object")
    own = _Given(cast("Mapping[str, Any]", weights), f"{given.where}{name}: weights: ")
    bits, number = own.values.get("num_bits", 8), own.values.get("type", "int")
    allowed = range(2, 9) if number == "int" else range(8, 9)
    if number not in _NUMBERS[kind] or type(bits) is not int or bits not in allowed:
        raise own.refused(f"{kind} with {bits!r} bits of type {number!r} is not read")
    size = None if own.get("group_size") is None else own.group_size("group_size")
    strategy = own.get("strategy") or _strategy(own, size)
    if strategy not in _STRATEGIES:
        raise own.refused(f"strategy {strategy!r} is not read; expected {_either(_STRATEGIES)}")
    if strategy == "group" and size is None:
        raise own.refused("strategy 'group': expected a group_size")
    block = _block(own) if strategy == "block" else None
    symmetric = own.values.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise own.refused(f"symmetric: expected true or false, received {symmetric!r}")
    return WeightArguments(kind, bits, number == "float", symmetric, strategy, size, block)


def _strategy(own: _Given, size: int | None) -> str:
    """The one that goes without saying."""
    if own.get("group_size") is None:
        return "tensor"
    return "channel" if size is None else "group"


def _block(own: _Given) -> tuple[int, int]:
    block = own.get("block_structure")
    sizes = cast("list[Any]", block) if isinstance(block, list | tuple) else []
    if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes):
        raise own.refused(f"block_structure: expected two sizes, received {block!r}")
    return sizes[0], sizes[1]


def _either(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
