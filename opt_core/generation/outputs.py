"""What `generate` returns where `return_dict_in_generate` is set."""

from dataclasses import dataclass
from typing import Any

from opt_core.outputs import ModelOutput


@dataclass
class GenerateOutput(ModelOutput[Any, Any]):
    """A generation and what was asked to be kept of it; what was not is None.

    Fields are read by name, by key or by place, as those of a model's output. For R rows:

    Attributes:
        sequences: (R, T + new) ids: the prompts, what was generated, and padding.
        sequences_scores: (R,) scores of beams.
        scores: For each new token (R, V) its filtered scores; of all beams in beam search.
        beam_indices: (R, new) beams that the tokens of each row came from, -1 behind its end.
    """

    sequences: Any = None
    sequences_scores: Any = None
    scores: Any = None
    beam_indices: Any = None
