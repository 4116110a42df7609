"""The models with other heads: sequence classification and question answering."""

from typing import Any, Unpack

import keras
import tensorflow as tf

from opt_core.compatibility.calls import CallOptions
from opt_core.errors import InputError
from opt_core.modeling import QuestionAnsweringMixin, SequenceClassificationMixin
from opt_core.training.labels import question_answering
from opt_tf import losses
from opt_tf.cache import KVCache
from opt_tf.decoder import TFOPTOutput
from opt_tf.modeling import TFOPTPreTrainedModel


@keras.saving.register_keras_serializable("opt_tf")
class TFOPTForSequenceClassification(SequenceClassificationMixin, TFOPTPreTrainedModel):
    """A classifier or regressor over whole texts."""

    def call(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        past_key_values: KVCache | None = None,
        labels: Any = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        training: bool | None = None,
        **kwargs: Unpack[CallOptions],
    ) -> TFOPTOutput:
        """Scores each text at its last token that is not `pad_token_id` (transformers' rule).

        Args:
            input_ids: As in `TFOPTModel.call`, like the other arguments not listed here.
            attention_mask: See there.
            position_ids: See there.
            inputs_embeds: See there; the very last token is scored then.
            past_key_values: See there.
            labels: (B,) class numbers, (B,) or (B, num_labels) floats for regression, or
                (B, num_labels) floats in 0..1 for several labels at once.
            output_hidden_states: See there.
            output_attentions: See there.
            training: See there.
            **kwargs: See there.
        """
        given = input_ids, attention_mask, position_ids, inputs_embeds, past_key_values
        out = self._decode(
            given, output_hidden_states, output_attentions, kwargs, training=training
        )
        return self._finish(out, kwargs, input_ids, labels)

    def _pick(self, hidden_BTP: tf.Tensor, index_B: tf.Tensor) -> tf.Tensor:
        return tf.gather(hidden_BTP, index_B, batch_dims=1)

    def _loss(self, x: Any, y: Any, output: TFOPTOutput) -> tf.Tensor:
        if y is None:
            raise InputError("expected labels among the inputs or as y, received none")
        assert output.logits is not None
        return losses.classification(output.logits, y, self.config)


@keras.saving.register_keras_serializable("opt_tf")
class TFOPTForQuestionAnswering(QuestionAnsweringMixin, TFOPTPreTrainedModel):
    """Extractive question answering: where the answer starts and ends."""

    def call(
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
        training: bool | None = None,
        **kwargs: Unpack[CallOptions],
    ) -> TFOPTOutput:
        """Computes start and end logits, and the loss where both positions are given.

        Args:
            input_ids: As in `TFOPTModel.call`, like the other arguments not listed here.
            attention_mask: See there.
            position_ids: See there.
            inputs_embeds: See there.
            past_key_values: See there.
            start_positions: (B,) first token of the answer; beyond the sequence: ignored.
            end_positions: (B,) last token of the answer; beyond the sequence: ignored.
            output_hidden_states: See there.
            output_attentions: See there.
            training: See there.
            **kwargs: See there.
        """
        given = input_ids, attention_mask, position_ids, inputs_embeds, past_key_values
        out = self._decode(
            given, output_hidden_states, output_attentions, kwargs, training=training
        )
        return self._finish(out, kwargs, start_positions, end_positions)

    def _predictions(self, output: TFOPTOutput) -> Any:
        return output.start_logits, output.end_logits

    def _loss(self, x: Any, y: Any, output: TFOPTOutput) -> tf.Tensor:
        if not isinstance(y, tuple | list) or len(y) != 2:
            raise InputError(
                "expected start_positions and end_positions among the inputs, or both as y"
            )
        assert output.start_logits is not None
        assert output.end_logits is not None
        return question_answering(losses, output.start_logits, output.end_logits, *y)
