"""The output of a model, said once: each backend registers its own subclass as a pytree."""

from dataclasses import dataclass
from typing import Generic, TypeVar

Tensor = TypeVar("Tensor")
Cache = TypeVar("Cache")


@dataclass
class ModelOutput(Generic[Tensor, Cache]):
    """Results of a model; a field its head does not have, or that was not asked for, is None.

    Attributes:
        last_hidden_state: (B, T, P) after the last norm and projection.
        logits: (B, T, V) of the language model, (B, num_labels) of the classifier.
        start_logits: (B, T), question answering.
        end_logits: (B, T), question answering.
        loss: Scalar, where labels were given.
        hidden_states: N + 1 tensors: the embeddings and each layer's output; the last one is
            `last_hidden_state`.
        attentions: N tensors (B, H, T, S): the attention weights, before dropout is applied to
            them.
        past_key_values: The cache that includes these tokens, where one was passed.
    """

    last_hidden_state: Tensor | None = None
    logits: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    past_key_values: Cache | None = None
