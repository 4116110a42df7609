"""Contrastive search (arXiv 2202.06417): likely tokens that are unlike what is there already."""

from typing import Any

import numpy as np

from opt_core.generation.hooks import Deadline
from opt_core.generation.observed import Steps
from opt_core.generation.request import Request, check_logits


def generate(model: Any, request: Request) -> Any:
    """The prompts and what follows them, (B, T + new) ids or a `GenerateOutput`.

    Of the `top_k` likeliest tokens that one is taken whose probability, less what its hidden state
    has in common with an earlier one's, is the largest: (1 - penalty_alpha) * p - penalty_alpha *
    the largest cosine.

    Raises:
        GenerationError: No token can come in a row.
    """
    settings = request.settings
    steps, k = Steps(model, request, 1), min(settings.top_k or 1, request.vocab_size)
    B, alpha = len(steps.history), settings.penalty_alpha or 0.0
    trackers, deadline = request.stop_trackers(B), Deadline(settings.max_time)
    ended = np.zeros(B, bool)
    logits = steps.logits(keeps_states=True)
    states, seen = _unit(steps.array(steps.states)), request.full_mask()
    while True:
        scores = steps.constrain(logits)
        if steps.made == 0:
            check_logits(steps.array(scores).max(1))
        if settings.output_scores:
            steps.kept["scores"].append(scores)
        numbers = steps.array(model.backend.sampling.normalize(scores))
        top = np.argsort(-numbers, 1, kind="stable")[:, :k].astype(np.int32)
        p = np.exp(np.take_along_axis(numbers, top, 1))
        tried, logits_BKV, new = steps.try_tokens(top)
        new = _unit(new)
        cosine = np.where(seen[:, None], new @ states.transpose(0, 2, 1), -np.inf)
        choice = ((1 - alpha) * p - alpha * cosine.max(2)).argmax(1)
        rows = np.arange(B)
        tokens = np.where(ended, request.pad, top[rows, choice]).astype(np.int32)
        steps.take(tried, tokens, (rows * k + choice).astype(np.int32))
        ended |= np.isin(tokens, settings.eos_ids)
        for row, tracker in enumerate(trackers):
            ended[row] |= tracker.push(int(tokens[row]))
        if not request.hooks.is_empty:
            ended |= request.hooks.stops(steps.ids, scores)
        if steps.made == request.new_tokens or ended.all() or deadline.is_over:
            return steps.result(steps.history[:, : steps.end])
        states = np.concatenate([states, new[rows, choice][:, None]], 1)
        seen = np.concatenate([seen, np.ones((B, 1), bool)], 1)
        logits = steps.tensor(logits_BKV[rows, choice])


def _unit(states: Any) -> Any:
    """The states with a length of 1."""
    return states / np.linalg.norm(states, axis=-1, keepdims=True)
