"""The output of a model, said once: each backend registers its own subclass as a pytree."""

from collections import OrderedDict
from typing import Any, Generic, Self, TypeVar

from opt_core.compatibility.kinds import OutputKind
from opt_core.summaries import describe_fields

Tensor = TypeVar("Tensor")
Cache = TypeVar("Cache")


class ModelOutput(OutputKind, OrderedDict[str, Any], Generic[Tensor, Cache]):
    """Results of a model, by attribute, by name and by number, as in `transformers`.

    A field its head does not have, or that was not asked for, is None as an attribute and is not
    among the keys: `out.loss`, `out["loss"]` and, where labels were given, `out[0]` are the same,
    and so is `loss` in `loss, logits = out[:2]`.

    Attributes:
        loss: Scalar, where labels were given.
        last_hidden_state: (B, T, P) after the last norm and projection, of a model without head.
        logits: (B, T, V) of the language model, (B, num_labels) of the classifier.
        start_logits: (B, T), question answering.
        end_logits: (B, T), question answering.
        past_key_values: The cache that includes these tokens.
            `cache` is another name of it.
        hidden_states: N + 1 tensors: the embeddings and each layer's output, the last one after the
            last norm and projection.
        attentions: N tensors (B, H, T, S): the attention weights, before dropout is applied to
            them.
    """

    loss: Tensor | None
    last_hidden_state: Tensor | None
    logits: Tensor | None
    start_logits: Tensor | None
    end_logits: Tensor | None
    past_key_values: Cache | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None

    def __init__(self, *items: Any, **fields: Any):
        """Makes an output of its fields, or of one mapping or its items, as rebuilding code does.

        Args:
            *items: A mapping, or pairs of a name and a value.
            **fields: Values by name; those that are None are left out.
        """
        super().__init__(*items, **{k: v for k, v in fields.items() if v is not None})

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in self._fields():
            return None
        if name == "cache":
            return self.past_key_values
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._fields():
            super().__setattr__(name, value)
        elif value is None:
            self.pop(name, None)
        else:
            self[name] = value

    def __getitem__(self, key: Any) -> Any:
        """The field of a name, or the one or those that a number or a slice picks."""
        if isinstance(key, str):
            return super().__getitem__("past_key_values" if key == "cache" else key)
        return self.to_tuple()[key]

    def __repr__(self) -> str:
        return describe_fields(type(self).__name__, self)

    @classmethod
    def _fields(cls) -> dict[str, Any]:
        """Fields that an output may have."""
        return ModelOutput.__annotations__

    def headed(self, **scores: Any) -> Self:
        """The output of a model with a head, whose scores stand in place of the hidden states."""
        rest = {k: v for k, v in self.items() if k != "last_hidden_state"}
        return type(self)(**scores, **rest)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are there, in their order."""
        return tuple(self.values())
