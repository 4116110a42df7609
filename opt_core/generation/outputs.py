"""The result of `generate` where `return_dict_in_generate` is set."""

from typing import Any

from opt_core.outputs import ModelOutput


class GenerateOutput(ModelOutput[Any, Any]):
    """A generation and what was asked to be kept of it, for R rows or beams.

    Attributes:
        sequences: (R, T + new) ids: the prompts, what was generated, and padding.
        sequences_scores: (R,) scores of beams.
        scores: For each new token (R, V) its filtered scores; of all beams in beam search.
        logits: For each new token (R, V) its logits.
        beam_indices: (R, new) rows of `scores` that the tokens came from, -1 behind a row's end.
        attentions: For each step the attention weights of each layer.
        hidden_states: For each step the hidden states.
        past_key_values: The cache that holds all tokens but the newest.
    """

    sequences: Any
    sequences_scores: Any
    scores: Any
    beam_indices: Any

    @classmethod
    def _fields(cls) -> dict[str, Any]:
        return ModelOutput.__annotations__ | cls.__annotations__
