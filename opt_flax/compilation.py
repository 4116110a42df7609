"""What the compiled programs of generation are made for, and what they take as arguments.

A program belongs to a model's structure and to those settings that decide its own. Shapes come from
a few lengths only, and all that is a number is an argument: another prompt, seed or temperature
finds the program made already.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from opt_core.generation.config import GenerationConfig

_BUCKETS = (32, 64, 128, 256)

_TRACED = {
    "temperature": None, "top_p": 1, "min_p": None, "typical_p": 1, "repetition_penalty": 1,
    "min_length": 0, "min_new_tokens": None, "length_penalty": None,
}  # fmt: skip


def bucket(length: int) -> int:
    """The length that something so long is padded to: 32, 64, 128, 256, 512, 768, ..."""
    step = _BUCKETS[-1]
    return next((b for b in _BUCKETS if b >= length), -(-length // step) * step)


@jax.tree_util.register_pytree_node_class
class TracedSettings:
    """A `GenerationConfig` whose numbers may be traced: those in use."""

    def __init__(self, fixed: GenerationConfig, numbers: dict[str, Any]):
        self.fixed, self.numbers = fixed, numbers

    def __getattr__(self, name: str) -> Any:
        numbers = self.__dict__["numbers"]
        return numbers[name] if name in numbers else getattr(self.__dict__["fixed"], name)

    def tree_flatten(self) -> tuple[tuple[dict[str, Any]], GenerationConfig]:
        """The numbers are data, all else belongs to the program."""
        return (self.numbers,), self.fixed

    @classmethod
    def tree_unflatten(cls, fixed: GenerationConfig, numbers: Any) -> "TracedSettings":
        """The inverse of `tree_flatten`."""
        return cls(fixed, *numbers)

    @classmethod
    def of(cls, settings: GenerationConfig) -> "TracedSettings":
        """Takes the numbers out of settings."""
        numbers = {
            name: getattr(settings, name)
            for name, off in _TRACED.items()
            if getattr(settings, name) not in (None, off)
        }
        defaults = {f.name: f.default for f in dataclasses.fields(settings)}
        # What does not reach the program must not tell two programs apart.
        rest = (
            *("max_length", "max_new_tokens", "stop_strings", "pad_token_id", "bos_token_id"),
            *("prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens"),
            "prefill_chunk_size",
        )
        fixed = {name: defaults[name] for name in (*numbers, *rest)}
        kinds = {"min_length": np.int32, "min_new_tokens": np.int32}
        values = {name: kinds.get(name, np.float32)(value) for name, value in numbers.items()}
        return cls(dataclasses.replace(settings, **fixed), values)
