"""Names that `transformers`' decoder and layers have for what is under other names here."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from opt_core.config import OPTConfig
from opt_core.errors import ArgumentError
from opt_core.inputs import Range
from opt_core.params import POSITION_OFFSET


class DecoderNames:
    """Attributes of a decoder, which follow from its configuration."""

    config: OPTConfig

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        return self.config.vocab_size

    @property
    def padding_idx(self) -> int | None:
        """The configuration's `pad_token_id`."""
        return self.config.pad_token_id

    @property
    def max_target_positions(self) -> int:
        """The configuration's `max_position_embeddings`."""
        return self.config.max_position_embeddings

    @property
    def dropout(self) -> float:
        """The configuration's."""
        return self.config.dropout

    @property
    def layerdrop(self) -> float:
        """The configuration's."""
        return self.config.layerdrop


class LayerNames:
    """Attributes of a decoder layer."""

    norm_first: bool
    activation: Any
    fc1: Any

    @property
    def do_layer_norm_before(self) -> bool:
        """Whether the norms stand before the layer's two parts."""
        return self.norm_first

    @property
    def activation_fn(self) -> Any:
        """The feed-forward part's function."""
        return self.activation

    @property
    def embed_dim(self) -> int:
        """Width D of the states."""
        return self.fc1.in_features


class AttentionNames:
    """Attributes of a layer's attention."""

    num_heads: int
    head_dim: int
    q_proj: Any

    @property
    def embed_dim(self) -> int:
        """Width D of the states."""
        return self.q_proj.in_features

    @property
    def scaling(self) -> float:
        """The factor that queries are multiplied by."""
        return self.head_dim**-0.5


class PositionTable:
    """A position table, which is called with a mask as `transformers` calls its own."""

    offset = POSITION_OFFSET

    @staticmethod
    def _check_ranges(ranges: list[Range]) -> None:
        """The backend's `check_ranges`."""
        raise NotImplementedError

    @staticmethod
    def _rows_of(mask_BS: Any, past: Any) -> Any:
        """The backend's `position_rows` for all tokens behind the first ones, of numbers."""
        raise NotImplementedError

    def _rows(self, given: Any, past: Any, position_ids: Any) -> Any:
        """Rows of the table; see the call's arguments.

        Raises:
            InputError: The mask is none.
        """
        if past is None:
            return given
        if position_ids is not None:
            return position_ids + self.offset
        what = "1 for tokens and 0 for padding; positions are passed as position_ids="
        self._check_ranges([Range("attention_mask", given, 0, 1, what)])
        return self._rows_of(given, past)


def run_by_model(run: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder's own call, which takes what a model has checked and embedded.

    Raises:
        ArgumentError: It was called as a model is.
    """

    @wraps(run)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "mask_BS" not in kwargs and len(args) < 3:
            raise ArgumentError(
                f"{type(self).__name__}: the decoder takes embeddings and is run by its model; "
                "call model.model(input_ids), the model without head, whose output is the decoder's"
            )
        return run(self, *args, **kwargs)

    return checked
