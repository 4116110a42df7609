"""Models that stay in their files: layers that compute with weights where they lie.

A weight is a view of its file, in the type that it has there. The layers say when they begin and
end (`opt_core.checkpoints.read_ahead`), so that the system reads the next ones meanwhile. Where the
model computes in a wider type, one weight at a time is widened into memory that all of them share:
the products are those of a model that was loaded as that type, bit for bit.

Such a model can only be run.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt_core.checkpoints.offload import stays_in_file
from opt_core.checkpoints.read_ahead import ReadAhead
from opt_core.dialects import TORCH
from opt_core.errors import ConfigError
from opt_core.params import param_specs
from opt_torch.linear import is_eager, multiply

if TYPE_CHECKING:
    from opt_torch.modeling import OPTPreTrainedModel


class Room:
    """Memory for one weight in the type that is computed in."""

    def __init__(self, size: int):
        """Makes it.

        Args:
            size: Numbers of the largest weight.
        """
        self.size = size
        self._buffer = torch.empty(0)
        self._lock = threading.Lock()

    @contextmanager
    def widened(self, weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        """A weight in another type; threads take turns.

        Args:
            weight: The weight.
            dtype: The type.

        Yields:
            Its numbers, until the end of the block.
        """
        with self._lock:
            if self._buffer.dtype != dtype or len(self._buffer) < self.size:
                self._buffer = torch.empty(self.size, dtype=dtype)
            yield self._buffer[: weight.numel()].view(weight.shape).copy_(weight)

    def __reduce__(self) -> Any:
        """The size is all that is copied and pickled."""
        return Room, (self.size,)


class OffloadedLinear(nn.Linear):
    """A linear layer whose weight lies in a file."""

    def __init__(self, in_features: int, out_features: int, bias: bool, room: Room):
        """Makes it, without values.

        Args:
            in_features: Inputs.
            out_features: Outputs.
            bias: Whether there is one.
            room: Where the weight is widened.
        """
        super().__init__(in_features, out_features, bias, "meta")
        self.room = room

    def forward(self, input: Tensor) -> Tensor:
        """Computes `input @ weight.T + bias`."""
        weight, bias = self.weight, self.bias
        if weight.dtype == input.dtype:
            return multiply(input, weight, bias)
        if not is_eager(input):  # a way back would need the weight as it is now
            return F.linear(input, weight.to(input.dtype), bias)
        with self.room.widened(weight.detach(), input.dtype) as wide:
            return multiply(input, wide, bias)


class OffloadedEmbedding(nn.Embedding):
    """A table that lies in a file."""

    def __init__(self, table: nn.Embedding, dtype: torch.dtype):
        """Takes the place of another, without values.

        Args:
            table: The other.
            dtype: Type of the rows that are looked up.
        """
        sizes = table.num_embeddings, table.embedding_dim
        super().__init__(*sizes, table.padding_idx, device="meta")
        self.dtype = dtype

    def forward(self, input: Tensor) -> Tensor:
        """Looks rows up."""
        return super().forward(input).to(self.dtype)


def prepare(model: "OPTPreTrainedModel", dtype: torch.dtype) -> None:
    """Makes the layers of a model without values such that their weights can stay in files.

    Args:
        model: The model, its weights on the meta device.
        dtype: Type to compute in.
    """
    specs = [spec for spec in param_specs(model.config, model.head) if stays_in_file(spec)]
    room = Room(max(spec.size for spec in specs))
    places = [TORCH.parent(model, spec) for spec in specs]
    if model.head == "causal_lm":
        places.append((model, "lm_head"))
    for parent, name in places:
        old = getattr(parent, name)
        if isinstance(old, nn.Embedding):
            new: nn.Module = OffloadedEmbedding(old, dtype)
        else:
            new = OffloadedLinear(old.in_features, old.out_features, old.bias is not None, room)
        setattr(parent, name, new.eval())


def attach(model: "OPTPreTrainedModel", reader: ReadAhead) -> None:
    """Has a model's layers say when they begin and end.

    Args:
        model: The model, its parameters in place.
        reader: What is told; its parts are the layers, then the language-model head.
    """
    parts: list[nn.Module] = [*model.get_decoder().layers]
    if model.head == "causal_lm":
        parts.append(model.get_submodule("lm_head"))
    for number, part in enumerate(parts):
        part.register_forward_pre_hook(_begin(reader, number))
        part.register_forward_hook(_end(reader, number), always_call=True)


def _begin(reader: ReadAhead, number: int) -> Any:
    return lambda *_: reader.enter(number)


def _end(reader: ReadAhead, number: int) -> Any:
    return lambda *_: reader.leave(number)


def check_not_offloaded(model: "OPTPreTrainedModel", action: str) -> None:
    """Refuses what a model that stays in its files cannot do.

    Args:
        model: The model.
        action: What it is asked to do, for the message.

    Raises:
        ConfigError: It stays there.
    """
    if isinstance(model.get_decoder().embed_tokens, OffloadedEmbedding):
        raise ConfigError(
            f"{action}: an offloaded model can only be run; load it without offload, where memory "
            "allows"
        )
