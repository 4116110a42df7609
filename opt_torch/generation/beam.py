"""Beam search on the same prefill and decode step as everything else.

Its results equal those of `transformers` 5.
"""

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core.generation import filters
from opt_core.generation.request import Request, allocate_tokens, check_logits
from opt_core.generation.rules import Rules
from opt_torch.generation import loop, sampling
from opt_torch.generation.fast_decode import make_step
from opt_torch.generation.prefill import read_prompts
from opt_torch.linear import packed

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM

NEG_INF = -1.0e9
"""Score of a place that holds no beam yet: finite, so that sums of it stay comparable."""


class Beams(NamedTuple):
    """A set of W hypotheses per prompt.

    Attributes:
        ids: (B, W, S) prompt and generated tokens, `pad` beyond a beam's length.
        scores: (B, W), best first.
        lengths: (B, W) tokens generated; 0 where there is no beam.
    """

    ids: Tensor
    scores: Tensor
    lengths: Tensor

    def pick(self, index_BX: Tensor) -> "Beams":
        """The hypotheses at some places of each prompt."""
        ids = self.ids.gather(1, index_BX[..., None].expand(-1, -1, self.ids.shape[2]))
        return Beams(ids, self.scores.gather(1, index_BX), self.lengths.gather(1, index_BX))

    def best(self, count: int) -> tuple["Beams", Tensor]:
        """The `count` best hypotheses, best first, and where they were."""
        index = self.scores.topk(count)[1]
        return self.pick(index), index


@torch.no_grad()
def search(model: "OPTForCausalLM", request: Request) -> Tensor:
    """Finds likely continuations by keeping the W best of them at every step.

    Args:
        model: The language model.
        request: A checked request with `num_beams` > 1.

    Returns:
        (B * num_return_sequences, T + new) ids, each prompt's best first.

    Raises:
        GenerationError: No token can come in a row.
    """
    settings, device = request.settings, model.device
    (B, prompt), W, new = request.ids.shape, settings.num_beams, request.new_tokens
    history, mask = (
        torch.as_tensor(x, device=device) for x in allocate_tokens(request, prompt + new, W)
    )
    rules = sampling.request_rules(model, request)
    empty = Beams(
        history.long().view(B, W, -1),
        torch.full((B, W), NEG_INF, device=device),
        torch.zeros((B, W), dtype=torch.long, device=device),
    )
    # All beams start alike: only the first may be continued, or the same text would come W times.
    running = empty._replace(scores=F.pad(empty.scores[:, 1:], (1, 0)))
    finished = empty
    is_open = torch.ones((B, 1), dtype=torch.bool, device=device)
    with packed(model, new):
        logits, cache = read_prompts(model, request, prompt + new - 1, W)
        step = make_step(model) or partial(loop.decode_step, model)
        for made in range(new):
            end, history = prompt + made, running.ids.flatten(0, 1)
            scores = sampling.normalize(loop.mask_vocabulary(logits, rules.vocabulary))
            scores = filters.process_logits(
                *(sampling, scores, history[:, :end], mask[:, :end], end, made, rules),
                is_last=made + 1 == new,
            )
            if made == 0:
                check_logits(scores.amax(-1).cpu().numpy())
            grown, parents = extend_beams(running, scores, end, made, rules)
            ends = rules.ends[grown.ids[:, :, end]] | (made + 1 == new)
            finished = finish_beams(finished, grown, ends, made, is_open, rules)
            running, index = grown._replace(scores=grown.scores + ends * NEG_INF).best(W)
            is_open = is_open & can_improve(running, finished, made + 1, new, rules)
            is_over = ends.all() | ~is_open.any()
            if rules.is_full_enough:
                is_over |= (finished.lengths > 0).all()
            if is_over:
                break
            parents = parents.gather(1, index) + W * torch.arange(B, device=device)[:, None]
            last = running.ids[:, :, end].flatten()
            logits, cache = step(last, cache.select(parents.flatten()))
    count = settings.num_return_sequences
    longest = int(finished.lengths[:, :count].max())
    return finished.ids[:, :count, : prompt + longest].flatten(0, 1)


def extend_beams(
    running: Beams, scores_RV: Tensor, end: int, made: int, rules: Rules
) -> tuple[Beams, Tensor]:
    """The best continuations of the running beams by one token.

    There are enough of them for W to remain should all others end.

    Args:
        running: The beams so far.
        scores_RV: Log-probabilities of the next token of each of the B * W beams.
        end: Slot of the next token.
        made: Tokens each beam has.
        rules: Those of the request.

    Returns:
        The grown beams, (B, C), and the number of the beam each came from, (B, C).
    """
    B, W = running.scores.shape
    V = scores_RV.shape[1]
    totals = (scores_RV.view(B, W, V) + running.scores[..., None]).view(B, W * V)
    count = min(max(2, 1 + rules.end_tokens) * W, W * V)
    scores, index = totals.topk(count)
    grown = running.pick(index // V)._replace(scores=scores)
    grown.ids[:, :, end] = index % V
    return grown._replace(lengths=torch.full_like(grown.lengths, made + 1)), index // V


def finish_beams(
    finished: Beams,
    grown: Beams,
    ends_BC: Tensor,
    made: int,
    is_open: Tensor,
    rules: Rules,
) -> Beams:
    """The W best finished beams after some of the grown ones ended.

    Only a beam among the W best continuations may finish; the others are reserves.
    """
    W = finished.scores.shape[1]
    ends_BC = ends_BC & (torch.arange(ends_BC.shape[1], device=ends_BC.device) < W)
    closed = ~is_open
    if rules.is_full_enough:
        closed = closed | (finished.lengths > 0).all(1, keepdim=True)
    scores = grown.scores / (made + 1) ** rules.length_penalty
    scores = scores + closed * NEG_INF + ~ends_BC * NEG_INF
    grown = Beams(grown.ids, scores, grown.lengths * ends_BC)
    both = Beams(*(torch.cat(pair, 1) for pair in zip(finished, grown, strict=True)))
    return both.best(W)[0]


def can_improve(running: Beams, finished: Beams, made: int, limit: int, rules: Rules) -> Tensor:
    """Whether a running beam could still beat a finished one, (B, 1).

    `early_stopping="never"` assumes the length that favours it most; otherwise its present one.
    """
    length = limit if rules.is_hopeful else made
    best = running.scores[:, :1] / length**rules.length_penalty
    worst = finished.scores.min(1, keepdim=True).values
    return (best > torch.where(finished.lengths > 0, worst, NEG_INF)).any(1, keepdim=True)
