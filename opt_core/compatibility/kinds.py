"""Outputs, tokenizers and encodings that `isinstance` takes for ones of `transformers`.

They keep every promise of those classes. Models and configurations are none: code that is told so
goes on to inner steps of `transformers` that they do not have; and PyTorch's own code (FSDP's
`fully_shard`, parametrizations) sets the `__class__` of a module.

`isinstance` asks an object for its `__class__` where its type does not say yes already. Nothing is
imported: a class that nobody has imported cannot be asked for.
"""

import sys
from typing import Any

_OUTPUTS = "transformers.modeling_outputs"
_TOKENIZERS = (
    ("transformers.tokenization_utils_tokenizers", "TokenizersBackend"),
    ("transformers.tokenization_utils_fast", "PreTrainedTokenizerFast"),  # before version 5
    ("transformers.tokenization_utils_base", "PreTrainedTokenizerBase"),
)

_GENERATED = {
    "GenerateOutput": "GenerateDecoderOnlyOutput",
    "GenerateBeamOutput": "GenerateBeamDecoderOnlyOutput",
}


class OutputKind:
    """A model's output counts as `transformers`' class of the same fields."""

    @staticmethod
    def _is_compiled() -> bool:
        """Whether a compiler is at work that takes `__class__` for the type."""
        return False

    @property
    def __class__(self) -> type[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The class of `transformers` that the output stands for, if its owner is there."""
        base = _theirs("transformers.utils.generic", "ModelOutput")
        if base is None or self._is_compiled():
            return type(self)
        return _theirs(*_output_names(self)) or base


class TokenizerKind:
    """A tokenizer counts as one over the `tokenizers` library, which is what programs look for."""

    autograph_info__ = None
    """TensorFlow's AutoGraph, which calls `__class__.__call__`, leaves what has this to itself."""

    @property
    def __class__(self) -> type[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`transformers`' fast tokenizer, or its base, if it is there."""
        return next(filter(None, (_theirs(*place) for place in _TOKENIZERS)), type(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), vars(self))  # pickle's own way compares `__class__`


class EncodingKind:
    """The result of a tokenizer's call counts as `transformers`' `BatchEncoding`."""

    @property
    def __class__(self) -> type[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`BatchEncoding`, if it is there."""
        return _theirs("transformers.tokenization_utils_base", "BatchEncoding") or type(self)


def _restore(kind: Any, attributes: dict[str, Any]) -> Any:
    made: Any = kind.__new__(kind)
    made.__dict__.update(attributes)
    return made


def _theirs(module: str, name: str) -> type[Any] | None:
    return getattr(sys.modules.get(module), name, None)


def _output_names(out: Any) -> tuple[str, str]:
    """Module and class of `transformers` for an output of PyTorch's models or of `generate`."""
    kind = type(out).__name__
    if kind in _GENERATED:
        return "transformers.generation.utils", _GENERATED[kind]
    if kind != "OPTOutput":
        return _OUTPUTS, ""  # TensorFlow's and Flax' are gone from `transformers`
    if "start_logits" in out:
        return _OUTPUTS, "QuestionAnsweringModelOutput"
    if "logits" not in out:
        return _OUTPUTS, "BaseModelOutputWithPast"
    is_rows = out["logits"].ndim == 2
    name = "SequenceClassifierOutputWithPast" if is_rows else "CausalLMOutputWithPast"
    return _OUTPUTS, name
