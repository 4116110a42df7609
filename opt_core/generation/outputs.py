"""The result of `generate` where `return_dict_in_generate` is set."""

from collections.abc import Callable
from typing import Any

from opt_core.outputs import ModelOutput


class Later:
    """A value of an output that is made when somebody reads it.

    Args:
        make: A function that makes it.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make


class GenerateOutput(ModelOutput[Any, Any]):
    """A generation and what was asked to be kept of it, for R rows or beams.

    Attributes:
        sequences: (R, T + new) ids: the prompts, what was generated, and padding.
        sequences_scores: (R,) scores of beams.
        scores: For each new token (R, V) its filtered scores; of all beams in beam search.
        logits: For each new token (R, V) its logits.
        beam_indices: (R, new) rows of `scores` that the tokens came from, -1 behind a row's end.
            Where no scores are kept, they are found by searching again, when they are read.
        attentions: For each step the attention weights of each layer.
        hidden_states: For each step the hidden states.
        past_key_values: The cache that holds all tokens but the newest. Compiled loops keep none:
            it is made of the sequences where it is read.
    """

    sequences: Any
    sequences_scores: Any
    scores: Any
    beam_indices: Any

    def __getitem__(self, key: Any) -> Any:
        """As of every output; what was put off is made now, and kept."""
        found = super().__getitem__(key)
        if isinstance(found, Later):
            found = self[key] = found.make()
        return found

    def values(self) -> Any:
        """The fields that are there."""
        return [self[name] for name in self]

    def items(self) -> Any:
        """Names and values of the fields that are there."""
        return [(name, self[name]) for name in self]

    @classmethod
    def _fields(cls) -> dict[str, Any]:
        return ModelOutput.__annotations__ | GenerateOutput.__annotations__


class GenerateBeamOutput(GenerateOutput):
    """A `GenerateOutput` of beam search."""


def make_output(settings: Any, **fields: Any) -> GenerateOutput:
    """The output of a generation, its fields in `transformers`' order.

    Args:
        settings: Those of the generation.
        **fields: What there is.
    """
    kind = GenerateBeamOutput if settings.is_beam_search else GenerateOutput
    if not settings.use_cache:
        fields["past_key_values"] = None
    return kind(**{name: fields.get(name) for name in _ORDER})


_ORDER = (
    *("sequences", "sequences_scores", "scores", "logits", "beam_indices", "attentions"),
    *("hidden_states", "past_key_values"),
)
