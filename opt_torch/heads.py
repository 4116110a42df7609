"""The models with other heads: sequence classification and question answering."""

from typing import Unpack

import torch
from torch import Tensor

from opt_core.compatibility.calls import CallOptions
from opt_core.modeling import QuestionAnsweringMixin, SequenceClassificationMixin
from opt_torch.cache import KVCache
from opt_torch.decoder import OPTOutput
from opt_torch.modeling import OPTPreTrainedModel


class OPTForSequenceClassification(SequenceClassificationMixin, OPTPreTrainedModel):
    """A classifier or regressor over whole texts."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[CallOptions],
    ) -> OPTOutput:
        """Scores each text at its last token that is not `pad_token_id` (transformers' rule).

        Args:
            input_ids: As in `OPTModel.forward`, like the other arguments not listed here.
            attention_mask: See there.
            position_ids: See there.
            inputs_embeds: See there; the very last token is scored then.
            past_key_values: See there.
            labels: (B,) class numbers, (B,) or (B, num_labels) floats for regression, or
                (B, num_labels) floats in 0..1 for several labels at once.
            output_hidden_states: See there.
            output_attentions: See there.
            **kwargs: See there.
        """
        given = input_ids, attention_mask, position_ids, inputs_embeds, past_key_values
        out = self._decode(given, output_hidden_states, output_attentions, kwargs)
        return self._finish(out, kwargs, input_ids, labels)

    def _pick(self, hidden_BTP: Tensor, index_B: Tensor) -> Tensor:
        return hidden_BTP[torch.arange(len(index_B), device=index_B.device), index_B]


class OPTForQuestionAnswering(QuestionAnsweringMixin, OPTPreTrainedModel):
    """Extractive question answering: where the answer starts and ends."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Unpack[CallOptions],
    ) -> OPTOutput:
        """Computes start and end logits, and the loss where both positions are given.

        Args:
            input_ids: As in `OPTModel.forward`, like the other arguments not listed here.
            attention_mask: See there.
            position_ids: See there.
            inputs_embeds: See there.
            past_key_values: See there.
            start_positions: (B,) first token of the answer; beyond the sequence: ignored.
            end_positions: (B,) last token of the answer; beyond the sequence: ignored.
            output_hidden_states: See there.
            output_attentions: See there.
            **kwargs: See there.
        """
        given = input_ids, attention_mask, position_ids, inputs_embeds, past_key_values
        out = self._decode(given, output_hidden_states, output_attentions, kwargs)
        return self._finish(out, kwargs, start_positions, end_positions)
