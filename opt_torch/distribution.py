"""A model over a mesh: PyTorch's tensor parallelism and FSDP2, by the one table of `opt_core.mesh`.

Linear layers and the vocabulary's table become DTensors over "model", each process holding its
heads, its part of the feed-forward layer and its rows of the vocabulary; `fully_shard` splits what
is left over "fsdp", and adds up the gradients over "data" and "fsdp". All of it happens while the
weights have no values: each process then reads its own part of every tensor.
"""

import math
import sys
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from opt_core import mesh as rules
from opt_core.dialects import TORCH
from opt_core.errors import ConfigError
from opt_core.params import ParamSpec, param_specs
from opt_torch.sharding import is_spread, mesh_device, place_of, sizes_of, sum_rows

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ParallelStyle

    from opt_torch.modeling import OPTPreTrainedModel


def materialize(model: "OPTPreTrainedModel", mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Splits a model over a mesh and gives every part of a parameter room, without values.

    Args:
        model: The model, its weights on the meta device.
        mesh: From `opt_torch.sharding.make_mesh`.
        dtype: Type of the weights.
    """
    model.to(dtype)
    _spread(model, mesh)
    model.to_empty(device=mesh_device(mesh))
    if model.head == "causal_lm" and model.config.tie_word_embeddings:
        model.get_submodule("lm_head").weight = model.get_decoder().embed_tokens.weight


def own_gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient of the part of a parameter that is here.

    DTensors may have left it to be added up, or may hold the whole of a tied embedding's.
    """
    gradient: Any = parameter.grad
    if is_spread(parameter) and gradient.placements != parameter.placements:
        parameter.grad = gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)


def check_trainable(model: "OPTPreTrainedModel") -> None:
    """Refuses a model that its processes could not train alike.

    Raises:
        ConfigError: Layers are left out at random: every process would leave out others, and wait.
    """
    if model.config.layerdrop:
        raise ConfigError(f"layerdrop: expected 0 on a mesh, received {model.config.layerdrop}")


def clip_gradients(parameters: list[nn.Parameter], limit: float, mesh: DeviceMesh) -> float:
    """Scales gradients down to a norm, that of all processes' parts together.

    Args:
        parameters: The trained ones; those that FSDP does not split have their gradients averaged
            over the processes first.
        limit: The largest norm.
        mesh: The mesh.

    Returns:
        The norm before.
    """
    gradients: list[Tensor] = []
    total = torch.zeros((), dtype=torch.float64, device=mesh_device(mesh))
    for parameter in parameters:
        if parameter.grad is None:
            continue
        values, parts, is_averaged = own_gradient(parameter), 1, False
        if is_spread(parameter):
            where = parameter.device_mesh
            parts = math.prod(
                where.size(dim)
                for dim, how in enumerate(parameter.placements)
                if not how.is_replicate()
            )
            is_averaged = "fsdp" in (where.mesh_dim_names or ())
        if not is_averaged:
            sum_rows(values, mesh).div_(rules.row_ways(sizes_of(mesh)))
        gradients.append(values)
        # What several processes hold counts once.
        total += values.double().square().sum() * parts / mesh.size()
    dist.all_reduce(total)
    norm = total.sqrt()
    for values in gradients:
        values.mul_((limit / (norm + 1e-6)).clamp(max=1.0).to(values.dtype))
    return norm.item()


def _spread(model: "OPTPreTrainedModel", mesh: DeviceMesh) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    config, sizes = model.config, sizes_of(mesh)
    specs = param_specs(config, model.head)
    for spec in specs:
        if spec.name.endswith(".weight") and (style := _style(spec, model, sizes)) is not None:
            layer, _ = TORCH.owner(model, spec)
            parallelize_module(layer, mesh["model"], style)
    decoder: Any = model.get_decoder()
    if local_heads(model, mesh) < config.num_attention_heads:
        for layer in decoder.layers:
            layer.self_attn.split_heads(mesh["model"])
    if model.head == "causal_lm" and config.tie_word_embeddings:
        head: Any = model.get_submodule("lm_head")
        if sizes["model"] > 1:
            parallelize_module(head, mesh["model"], ColwiseParallel(output_layouts=Replicate()))
        head.weight = decoder.embed_tokens.weight
    if model.head != "none":
        inner: Any = model.get_submodule("model")
        inner.mesh = mesh
    if rules.row_ways(sizes) > 1:
        _shard_fully(model, mesh)


def local_heads(model: "OPTPreTrainedModel", mesh: DeviceMesh | None) -> int:
    """Heads of attention that this process computes."""
    heads = model.config.num_attention_heads
    if mesh is None or not rules.divides(heads, "model", sizes_of(mesh)):
        return heads
    return heads // sizes_of(mesh)["model"]


def own_part(spec: ParamSpec, model: "OPTPreTrainedModel") -> tuple[slice, ...]:
    """The part of a parameter that this process holds, as a slice of each dimension."""
    if model.mesh is None:
        return (slice(None),)
    return _part(spec, model, sizes_of(model.mesh), place_of(model.mesh))


def put_part(model: "OPTPreTrainedModel", spec: ParamSpec, values: Tensor) -> None:
    """Gives a parameter its values.

    Args:
        model: The model.
        spec: The parameter.
        values: The part of this process (`own_part`); without a mesh they become the parameter.
    """
    if model.mesh is None:
        setattr(*TORCH.owner(model, spec), nn.Parameter(values))
        return
    parameter = sharded(model, spec)
    if parameter.is_meta:
        setattr(*TORCH.owner(model, spec), nn.Parameter(_adapter_part(model, spec, values)))
        return
    with torch.no_grad():
        local(parameter).copy_(values)


def add_product(
    model: "OPTPreTrainedModel", layer: nn.Module, high: Tensor, low: Tensor, scale: float
) -> Tensor:
    """Adds the product of an adapter to a layer's weight, each process to its own part.

    Args:
        model: The model, on a mesh.
        layer: The layer.
        high: (out, rank) matrix, which the processes may share.
        low: (rank, in) matrix.
        scale: Factor of the product.

    Returns:
        The part as it was before.
    """
    settle(model)
    spec = next(
        spec for spec in param_specs(model.config, model.head)
        if spec.name.endswith(".weight") and TORCH.owner(model, spec)[0] is layer
    )  # fmt: skip
    rows, columns = own_part(spec, model)
    high, low = (x.full_tensor() if is_spread(x) else x for x in (high, low))
    with torch.no_grad():
        weight: Any = layer.weight
        part = local(weight)
        before = part.clone()
        product = high[rows] @ low[:, columns] * scale
        part.copy_(part.to(product.dtype) + product)
    return before


def _adapter_part(model: "OPTPreTrainedModel", spec: ParamSpec, values: Tensor) -> Tensor:
    """A process' part of an adapter: over "model" it lies as its layer does, FSDP knows it not."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh: Any = model.mesh
    sizes, values = sizes_of(mesh), values.clone()
    name = spec.name.rpartition(".lora_")[0] + ".weight"
    layer = next(s for s in param_specs(model.config, model.head) if s.name == name)
    if "model" not in rules.split_axes(layer, model.config, sizes):
        return values
    dim = _dims(spec, model, sizes).get("model")
    where = Replicate() if dim is None else Shard(dim)
    return DTensor.from_local(values, mesh["model"], [where])


def gather(model: "OPTPreTrainedModel", spec: ParamSpec, part: Tensor) -> Tensor:
    """The whole of a parameter, or of anything of its shape, on every process.

    All processes must come here in the same order. One part is under way at a time.

    Args:
        model: The model.
        spec: The parameter.
        part: The part of this process.
    """
    mesh: Any = model.mesh
    sizes, whole = sizes_of(mesh), part.new_empty(spec.shape)
    split = {axis for axis in _dims(spec, model, sizes) if axis is not None}
    ranks = mesh.mesh[0]
    for fsdp in range(sizes["fsdp"] if "fsdp" in split else 1):
        for number in range(sizes["model"] if "model" in split else 1):
            owner = int(ranks[fsdp, number])
            place = _part(spec, model, sizes, {"data": 0, "fsdp": fsdp, "model": number})
            if dist.get_rank() == owner:
                values = part.contiguous()
            else:
                values = part.new_empty([s.stop - s.start for s in place])
            dist.broadcast(values, src=owner)
            whole[place] = values
    return whole


def sharded(model: "OPTPreTrainedModel", spec: ParamSpec) -> Tensor:
    """A parameter as its process keeps it between the steps."""
    if model.mesh is not None:
        settle(model)
    return getattr(*TORCH.owner(model, spec))


def local(values: Tensor) -> Tensor:
    """The part of a tensor that is here."""
    return values.to_local() if is_spread(values) else values


def settle(model: nn.Module) -> None:
    """Lets go of weights that were gathered for a computation."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # then nothing has been split
        return
    part: Any
    for part in model.modules():
        if isinstance(part, fsdp.FSDPModule):
            part.reshard()


def _style(
    spec: ParamSpec, model: "OPTPreTrainedModel", sizes: dict[str, int]
) -> "ParallelStyle | None":
    """The way of PyTorch's to split the layer of a weight over "model"; None: it stays whole."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    parts = rules.split_axes(spec, model.config, sizes)
    if "model" not in parts:
        return None
    if spec.kind == "embedding":
        return RowwiseParallel(input_layouts=Replicate())
    if parts[0] == "model":
        whole = spec.axes[0] == "vocab"  # logits are for choosing among all of them
        return ColwiseParallel(output_layouts=Replicate() if whole else Shard(-1))
    return RowwiseParallel()


def _shard_fully(model: "OPTPreTrainedModel", mesh: DeviceMesh) -> None:
    """Applies FSDP2 to each layer and to the model."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard

    # The logits of a linear layer are a view; who writes into them, writes into nothing of ours.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPOPT\w+\) returned a view")
    sizes = sizes_of(mesh)
    where = mesh["data", "fsdp"] if sizes["data"] > 1 else mesh["fsdp"]
    dims = {
        getattr(*TORCH.owner(model, spec)): _dims(spec, model, sizes).get("fsdp", 0)
        for spec in param_specs(model.config, model.head)
    }

    def choose(parameter: nn.Parameter) -> "Shard":
        return Shard(dims[parameter])

    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=where, shard_placement_fn=choose)
    fully_shard(model, mesh=where, shard_placement_fn=choose)
    root: Any = model
    register_fsdp_forward_method(root, "_gather_rest")
    decoder = model.get_decoder()
    for part in (decoder, *_outside(model)):
        part.register_forward_pre_hook(lambda *_: _wake(root), prepend=True)


def _outside(model: "OPTPreTrainedModel") -> Iterable[nn.Module]:
    """The modules of no layer that generation calls by themselves."""
    yield model.get_decoder().embed_tokens
    for name in ("lm_head", "score", "qa_outputs"):
        if hasattr(model, name):
            yield model.get_submodule(name)


def _wake(model: Any) -> None:
    """Gathers the weights of no layer, where a part of the model is called before the model is."""
    weight = model.get_decoder().embed_positions.weight
    if is_spread(weight):
        model._gather_rest()


def _dims(spec: ParamSpec, model: "OPTPreTrainedModel", sizes: dict[str, int]) -> dict[str, int]:
    """The dimension of a parameter that each mesh axis splits.

    FSDP2 leaves nothing whole: what the table gives to no "fsdp" is split in its first dimension.
    """
    parts = rules.split_axes(spec, model.config, sizes)
    dims = {axis: dim for dim, axis in enumerate(parts) if axis is not None}
    if "rank" in spec.axes:  # an adapter's, too small to be worth splitting
        dims.pop("fsdp", None)
    elif sizes["fsdp"] > 1:
        dims.setdefault("fsdp", 0)
    return dims


def _part(
    spec: ParamSpec, model: "OPTPreTrainedModel", sizes: dict[str, int], place: dict[str, int]
) -> tuple[slice, ...]:
    part = [slice(0, size) for size in spec.shape]
    dims = _dims(spec, model, sizes)
    for axis in ("model", "fsdp"):  # in the order that they are split
        if axis in dims:
            whole = part[dims[axis]]
            own = rules.chunk(whole.stop - whole.start, sizes[axis], place[axis])
            part[dims[axis]] = slice(whole.start + own.start, whole.start + own.stop)
    return tuple(part)
