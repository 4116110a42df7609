"""Weights in and out of a model, through the parameter list and the NNX dialect."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from numpy.typing import NDArray

from opt_core.checkpoints import pretrained
from opt_core.checkpoints.tensors import cast_array
from opt_core.compatibility.saving import SaveOptions, refuse_unsafe
from opt_core.compatibility.subclasses import is_own_class, make_model
from opt_core.dialects import NNX, follow
from opt_core.errors import CheckpointError, ConfigError
from opt_core.initialization import initial_value
from opt_core.params import ParamSpec, param_specs
from opt_core.quantization import QuantizedTensor, is_quantized
from opt_core.training.lora import check_merged
from opt_flax import attention, quantization, sharding

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTPreTrainedModel

M = TypeVar("M", bound="FlaxOPTPreTrainedModel")

_FLOAT32 = np.dtype(np.float32)


def initialize(model: "FlaxOPTPreTrainedModel", seed: int, dtype: np.dtype[Any] = _FLOAT32) -> None:
    """Gives every parameter its starting value."""
    for group in _groups(model):
        values = [initial_value(spec, model.config, seed) for spec in group]
        _fill(model, group, values, dtype)


def init_abstract(model: "FlaxOPTPreTrainedModel", dtype: np.dtype[Any]) -> None:
    """Gives every parameter its shape, type and place, as `jax.ShapeDtypeStruct`, and no values."""
    for group in _groups(model):
        shape, sharding = _layout(model, group)
        _assign(model, group, jax.ShapeDtypeStruct(shape, dtype, sharding=sharding))


def from_pretrained(
    cls: type[M],
    path_or_hub_id: str | PathLike[str] | None,
    dtype: Any,
    mesh: Mesh | None,
    attn_implementation: str | None,
    progress: Callable[[int, int], None] | None,
    config: Any,
    scan_layers: bool,
    quantize: str | None,
    **arguments: Any,
) -> Any:
    """Loads a checkpoint tensor by tensor; see `FlaxOPTPreTrainedModel.from_pretrained`."""
    source = pretrained.open_pretrained(
        cls.head,
        path_or_hub_id,
        dtype,
        config,
        quantize,
        has_own_layers=is_own_class(cls),
        **arguments,
    )
    if source.quantize is not None and (mesh is not None or scan_layers):
        other = "scan_layers" if mesh is None else "mesh"
        raise ConfigError(f"quantize: expected None with {other}, received {source.quantize!r}")
    source.check_place("mesh= or jax.default_device")
    source.check_in_memory()
    wanted = _as_dtype(source.dtype)
    if attn_implementation == "flash_attention_2":
        attention.check_flash(attention.platform_of(mesh), wanted)
    model = make_model(
        cls, source.config, seed=None, attn_implementation=attn_implementation,
        scan_layers=scan_layers, mesh=mesh,
    )  # fmt: skip
    groups = {spec.name: group for group in _groups(model) for spec in group}
    waiting: dict[str, NDArray[Any]] = {}
    for spec, values in source.stream(progress):
        if isinstance(values, QuantizedTensor):
            quantization.set_quantized(model, spec, values, wanted)
        else:
            waiting[spec.name] = values  # a view of the file: nothing was read yet
            group = groups[spec.name]
            if all(s.name in waiting for s in group):
                _fill(model, group, [waiting.pop(s.name) for s in group], wanted)
        del values  # or the next tensor would be read while this one is still held
    return source.finish(model)


def save_pretrained(model: "FlaxOPTPreTrainedModel", options: SaveOptions) -> None:
    """Writes a canonical folder; see `FlaxOPTPreTrainedModel.save_pretrained`.

    The first process writes; the others take part in gathering, and wait until all is there.
    """
    refuse_unsafe(options, "flax-msgpack")
    check_merged((module for _, module in nnx.iter_graph(model)), str(options.folder))
    dtype = model.dtype.name
    if is_quantized(model):  # and on one device
        pretrained.save_quantized(model, options, lambda spec: get_numbers(model, spec), dtype)
        return
    get = options.values(lambda spec: as_array(get_parameter(model, spec)), as_array)
    left = param_specs(model.config, model.head)

    def fetch(spec: ParamSpec) -> NDArray[Any]:
        """A parameter; all processes must come here in the same order."""
        assert left.pop(0) == spec
        return get(spec)

    failure: Exception | None = None
    try:
        if jax.process_index() == 0:
            pretrained.save_pretrained(model, options, fetch, dtype)
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        while left:  # what process 0 did not come to: the others must not wait for it in vain
            fetch(left[0])
        done = multihost_utils.process_allgather(np.array(failure is None))
        if failure is None and not done.all():
            raise CheckpointError(
                f"{options.folder}: not saved: process 0 could not write; see its error"
            )
    if failure is not None:
        raise failure


def locate(model: "FlaxOPTPreTrainedModel", spec: ParamSpec) -> nnx.Param[Any]:
    """The variable that holds a parameter, or those of all layers where they are stacked."""
    return follow(model, parameter_path(model, spec)[0])


def get_parameter(model: "FlaxOPTPreTrainedModel", spec: ParamSpec) -> Array:
    """A parameter's values, in the canonical layout (a linear weight is [out, in]).

    Those of a quantised one are what it stands for.
    """
    weight = quantization.get_quantized(model, spec)
    if weight is not None:
        return weight.dequantize()
    values, layer = locate(model, spec)[...], parameter_path(model, spec)[1]
    return (values if layer is None else values[layer])[: spec.shape[0]]


def get_numbers(model: "FlaxOPTPreTrainedModel", spec: ParamSpec) -> NDArray[Any] | QuantizedTensor:
    """A parameter's values on the host; of a quantised one, the numbers that it is kept as."""
    weight = quantization.get_quantized(model, spec)
    return as_array(get_parameter(model, spec)) if weight is None else weight.numbers()


def set_parameter(model: "FlaxOPTPreTrainedModel", spec: ParamSpec, values: NDArray[Any]) -> None:
    """Replaces a parameter's values, given in the canonical layout."""
    variable, layer = locate(model, spec), parameter_path(model, spec)[1]
    if layer is None:
        _fill(model, [spec], [np.asarray(values)], np.dtype(variable.dtype))
    else:
        variable.set_value(variable[...].at[layer].set(jnp.asarray(values, variable.dtype)))


def spread_values(
    model: "FlaxOPTPreTrainedModel", spec: ParamSpec, values: NDArray[Any], dtype: Any
) -> Array:
    """Values of a parameter, or of anything of its shape, where the model's own would lie.

    Args:
        model: The model; its layers are not stacked.
        spec: The parameter.
        values: In the canonical layout; they may be views of a file.
        dtype: Type to keep them in.
    """
    if model.mesh is None:
        return jnp.array(values, dtype)
    if "rank" in spec.axes:
        return sharding.place(jnp.array(values, dtype), model.mesh)
    shape, where = _layout(model, [spec])
    return _place(shape, where, _parts_of([spec], [values], shape, np.dtype(dtype)))


def set_arrays(model: "FlaxOPTPreTrainedModel", arrays: Mapping[str, Array]) -> None:
    """Replaces all parameters by arrays, which may be traced and of any type.

    Args:
        model: The model.
        arrays: Canonical name -> values in the canonical layout.
    """
    for group in _groups(model):
        shape, values = _shape(model, group), [arrays[spec.name] for spec in group]
        whole = jnp.stack(values) if len(shape) > len(group[0].shape) else values[0]
        if whole.shape != shape:  # on a mesh rows of zeros may end it
            free = [(0, size - have) for size, have in zip(shape, whole.shape, strict=True)]
            whole = jnp.pad(whole, free)
        _assign(model, group, whole)


def as_array(values: Array) -> NDArray[Any]:
    """An array on the host, gathered from all hosts where they share it."""
    if not getattr(values, "is_fully_addressable", True):
        values = multihost_utils.process_allgather(values, tiled=True)
    return np.asarray(values)


def parameter_path(
    model: "FlaxOPTPreTrainedModel", spec: ParamSpec
) -> tuple[tuple[str | int, ...], int | None]:
    """Where a parameter lies in the model's state, and its place in a stack of layers or None."""
    path = [int(part) if part.isdigit() else part for part in NNX.path(spec, model.head)]
    layer = None
    if model.get_decoder().scan_layers:
        layer = next((part for part in path if isinstance(part, int)), None)
        path = [part for part in path if not isinstance(part, int)]
    return tuple(path), layer


def _as_dtype(name: str) -> np.dtype[Any]:
    """A type by its name.

    Raises:
        ConfigError: float64, and JAX has it switched off.
    """
    wanted = jnp.dtype(name)
    if wanted == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ConfigError(
            'dtype: JAX has float64 switched off; jax.config.update("jax_enable_x64", True), '
            "or load as float32"
        )
    return wanted


def _groups(model: "FlaxOPTPreTrainedModel") -> list[list[ParamSpec]]:
    """The parameters by variable: one each, or those of all layers where they are stacked."""
    groups: dict[str, list[ParamSpec]] = {}
    for spec in param_specs(model.config, model.head):
        parts = spec.name.split(".")
        if model.get_decoder().scan_layers:
            parts = ["*" if part.isdigit() else part for part in parts]
        groups.setdefault(".".join(parts), []).append(spec)
    return list(groups.values())


def _shape(model: "FlaxOPTPreTrainedModel", group: Sequence[ParamSpec]) -> tuple[int, ...]:
    """The shape of a variable."""
    spec = group[0]
    shape = tuple(
        sharding.padded_rows(spec, model.mesh) if axis == "vocab" else size
        for axis, size in zip(spec.axes, spec.shape, strict=True)
    )
    return shape if parameter_path(model, spec)[1] is None else (len(group), *shape)


def _layout(
    model: "FlaxOPTPreTrainedModel", group: Sequence[ParamSpec]
) -> tuple[tuple[int, ...], Sharding]:
    """The shape and place of a variable."""
    spec, shape = group[0], _shape(model, group)
    stacked = len(shape) > len(spec.shape)
    if model.mesh is None:
        with jax.ensure_compile_time_eval():  # a model may be made while something is traced
            return shape, SingleDeviceSharding(jnp.zeros(()).device)
    parts = sharding.partition(spec, model.config, model.mesh)
    return shape, NamedSharding(model.mesh, PartitionSpec(None, *parts) if stacked else parts)


def _fill(
    model: "FlaxOPTPreTrainedModel",
    group: Sequence[ParamSpec],
    arrays: Sequence[NDArray[Any]],
    dtype: np.dtype[Any],
) -> None:
    """Gives a variable its values, each device reading its own part.

    Args:
        model: The model.
        group: The parameters that the variable holds.
        arrays: Their values in the canonical layout; they may be views of a file.
        dtype: Type to keep them in.
    """
    shape, sharding = _layout(model, group)
    part = _parts_of(group, arrays, shape, dtype)
    if model.mesh is None:  # not committed to the device: it goes where it is used
        # jnp.asarray would compile a program for every shape.
        _assign(model, group, jax.device_put(part(tuple(slice(size) for size in shape))))
    else:
        _assign(model, group, _place(shape, sharding, part))


def _parts_of(
    group: Sequence[ParamSpec],
    arrays: Sequence[NDArray[Any]],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> Callable[[tuple[slice, ...]], NDArray[Any]]:
    """A function that makes the part of a variable that lies at some indices.

    Args:
        group: The parameters that the variable holds.
        arrays: Their values in the canonical layout; they may be views of a file.
        shape: The variable's.
        dtype: Type to keep them in.
    """
    stacked = len(shape) > len(group[0].shape)

    def part(index: tuple[slice, ...]) -> NDArray[Any]:
        """The part that one device holds, rows beyond the vocabulary being zeros."""
        layers, places = (index[0], index[1:]) if stacked else (slice(1), index)
        pieces = []
        for spec, array in zip(group[layers], arrays[layers], strict=True):
            # A copy: what JAX is given it may keep, and the file or the caller's array may change.
            piece = cast_array(spec.name, np.array(array[places], order="C"), dtype)
            sizes = [len(range(n)[s]) for n, s in zip(shape[-array.ndim :], places, strict=True)]
            free = [(0, size - have) for size, have in zip(sizes, piece.shape, strict=True)]
            pieces.append(np.pad(piece, free) if any(after for _, after in free) else piece)
        return np.stack(pieces) if stacked else pieces[0]

    return part


def _place(
    shape: tuple[int, ...], sharding: Sharding, part: Callable[[tuple[slice, ...]], NDArray[Any]]
) -> Array:
    """An array whose parts are made one after the other, once for all devices that hold the same.

    Args:
        shape: Shape of the whole.
        sharding: Which device holds what.
        part: Makes the values at some indices.
    """
    places = sharding.addressable_devices_indices_map(shape).items()
    made: list[Array] = []
    index, piece = None, np.empty(0)
    for device, wanted in sorted(places, key=lambda place: str(place[1])):
        assert wanted is not None
        if wanted != index:
            index, piece = wanted, part(wanted)
        made.append(jax.device_put(piece, device).block_until_ready())
    return jax.make_array_from_single_device_arrays(shape, sharding, made)


def _assign(model: "FlaxOPTPreTrainedModel", group: Sequence[ParamSpec], values: Any) -> None:
    """Makes an array, or one's shape and type alone, the value of a variable."""
    locate(model, group[0]).set_value(values)
