"""The neutral half of a decoder: what is before and behind its layers, and where norms stand."""

from collections.abc import Callable
from typing import Any

from opt_core.compatibility.parts import DecoderNames, LayerNames


class DecoderMixin(DecoderNames):
    """The parts of a decoder before and behind its layers."""

    project_in: Any
    project_out: Any
    embed_positions: Any
    final_layer_norm: Any

    @staticmethod
    def _project(layer: Any, input: Any) -> Any:
        """A linear layer's output."""
        return layer(input)

    def _enter(self, embeds: Any, rows: Any) -> Any:
        """The layers' input (B, T, D) of embeddings (B, T, P) and rows of the position table."""
        hidden = embeds if self.project_in is None else self._project(self.project_in, embeds)
        return hidden + self.embed_positions(rows, None)

    def _leave(self, hidden: Any) -> Any:
        """The output (B, T, P) of the last layer's states (B, T, D)."""
        if self.final_layer_norm is not None:
            hidden = self.final_layer_norm(hidden)
        return hidden if self.project_out is None else self._project(self.project_out, hidden)


class DecoderLayerMixin(LayerNames):
    """Where a layer's norms stand: before its two parts, or, in opt-350m, behind them."""

    norm_first: bool

    def _residual(self, hidden: Any, norm: Any, part: Callable[[Any], tuple[Any, ...]]) -> Any:
        """One part of a layer with its norm and residual connection.

        Args:
            hidden: States (B, T, D).
            norm: The part's norm.
            part: Gives the change of the states, and whatever else there is.

        Returns:
            The new states, and whatever else there is.
        """
        change, *rest = part(norm(hidden) if self.norm_first else hidden)
        hidden = hidden + change
        return hidden if self.norm_first else norm(hidden), *rest
