"""The models with other heads: sequence classification and question answering."""

from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx
from jax import Array

from opt_core.modeling import QuestionAnsweringMixin, SequenceClassificationMixin
from opt_flax.cache import KVCache
from opt_flax.compatibility import FlaxCallOptions
from opt_flax.decoder import FlaxOPTOutput
from opt_flax.modeling import FlaxOPTPreTrainedModel


class FlaxOPTForSequenceClassification(SequenceClassificationMixin, FlaxOPTPreTrainedModel):
    """A classifier or regressor over whole texts."""

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        past_key_values: KVCache | None = None,
        labels: Any = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        **kwargs: Unpack[FlaxCallOptions],
    ) -> FlaxOPTOutput:
        """Scores each text at its last token that is not `pad_token_id` (transformers' rule).

        Args:
            input_ids: As in `FlaxOPTModel.__call__`, like the other arguments not listed here.
            attention_mask: See there.
            position_ids: See there.
            inputs_embeds: See there; the very last token is scored then.
            past_key_values: See there.
            labels: (B,) class numbers, (B,) or (B, num_labels) floats for regression, or
                (B, num_labels) floats in 0..1 for several labels at once.
            output_hidden_states: See there.
            output_attentions: See there.
            deterministic: See there.
            rngs: See there.
            **kwargs: See there.
        """
        given = input_ids, attention_mask, position_ids, inputs_embeds, past_key_values
        out = self._decode(
            given, output_hidden_states, output_attentions, kwargs,
            deterministic=deterministic, rngs=rngs,
        )  # fmt: skip
        return self._finish(out, kwargs, input_ids, labels)

    def _pick(self, hidden_BTP: Array, index_B: Array) -> Array:
        return hidden_BTP[jnp.arange(len(index_B)), index_B]


class FlaxOPTForQuestionAnswering(QuestionAnsweringMixin, FlaxOPTPreTrainedModel):
    """Extractive question answering: where the answer starts and ends."""

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        past_key_values: KVCache | None = None,
        start_positions: Any = None,
        end_positions: Any = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        **kwargs: Unpack[FlaxCallOptions],
    ) -> FlaxOPTOutput:
        """Computes start and end logits, and the loss where both positions are given.

        Args:
            input_ids: As in `FlaxOPTModel.__call__`, like the other arguments not listed here.
            attention_mask: See there.
            position_ids: See there.
            inputs_embeds: See there.
            past_key_values: See there.
            start_positions: (B,) first token of the answer; beyond the sequence: ignored.
            end_positions: (B,) last token of the answer; beyond the sequence: ignored.
            output_hidden_states: See there.
            output_attentions: See there.
            deterministic: See there.
            rngs: See there.
            **kwargs: See there.
        """
        given = input_ids, attention_mask, position_ids, inputs_embeds, past_key_values
        out = self._decode(
            given, output_hidden_states, output_attentions, kwargs,
            deterministic=deterministic, rngs=rngs,
        )  # fmt: skip
        return self._finish(out, kwargs, start_positions, end_positions)
