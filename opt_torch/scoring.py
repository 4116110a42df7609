"""Scores for evaluation, NumPy in and NumPy out: every backend gives the same."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opt_core.evaluation.scoring import LOGITS, mask_scores
from opt_torch.losses import upcast

if TYPE_CHECKING:
    from opt_torch.heads import OPTForQuestionAnswering, OPTForSequenceClassification
    from opt_torch.modeling import OPTForCausalLM


@torch.no_grad()
def token_scores(
    model: "OPTForCausalLM", input_ids: Any, attention_mask: Any = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """How likely each next token was, and whether none was likelier.

    Args:
        model: The language model, in evaluation mode.
        input_ids: (B, T) ids.
        attention_mask: (B, T): 1 for tokens, 0 for padding. Padding on the right needs none: what
            comes later changes nothing, and the scores of padding can be left aside.

    Returns:
        (B, T - 1) log-likelihoods in nats of the tokens 1 to T - 1, and as many booleans. Where
        a token or the one before it is masked: 0, and True.

    Raises:
        InputError: Inputs that do not fit the model.
    """
    hidden_BTP = model.model(input_ids, attention_mask, use_cache=False).last_hidden_state[:, :-1]
    ids_BT = torch.as_tensor(input_ids, device=hidden_BTP.device).long()[:, 1:]
    step = max(1, LOGITS // (len(ids_BT) * model.config.vocab_size))
    pieces = zip(hidden_BTP.split(step, 1), ids_BT.split(step, 1), strict=True)
    parts = [_scored(model, hidden, targets) for hidden, targets in pieces]
    scores, likeliest = (torch.cat(part, 1).cpu().numpy() for part in zip(*parts, strict=True))
    if attention_mask is not None:
        attention_mask = torch.as_tensor(attention_mask).cpu()
    return mask_scores(scores, likeliest, attention_mask)


def token_log_likelihoods(
    model: "OPTForCausalLM", input_ids: Any, attention_mask: Any = None
) -> NDArray[np.float32]:
    """The first half of `token_scores`: (B, T - 1) log-likelihoods of the next tokens."""
    return token_scores(model, input_ids, attention_mask)[0]


@torch.no_grad()
def class_logits(
    model: "OPTForSequenceClassification", input_ids: Any, attention_mask: Any = None
) -> NDArray[np.float32]:
    """The classifier's scores, (B, num_labels); arguments as in `token_scores`."""
    logits = model(input_ids, attention_mask, use_cache=False).logits
    return logits.float().cpu().numpy()


@torch.no_grad()
def span_logits(
    model: "OPTForQuestionAnswering", input_ids: Any, attention_mask: Any = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Where an answer starts and where it ends, (B, T) each; arguments as in `token_scores`."""
    out = model(input_ids, attention_mask, use_cache=False)
    return out.start_logits.float().cpu().numpy(), out.end_logits.float().cpu().numpy()


def _scored(
    model: "OPTForCausalLM", hidden_BTP: Tensor, targets_BT: Tensor
) -> tuple[Tensor, Tensor]:
    logits = upcast(model.compute_logits(hidden_BTP))
    picked = logits.gather(-1, targets_BT[..., None])[..., 0]
    return (picked - logits.logsumexp(-1)).float(), picked == logits.amax(-1)
