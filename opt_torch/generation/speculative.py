"""Speculative decoding: several tokens are drafted, one pass of the model checks them all.

Drafts come from the row itself (prompt lookup) or from a smaller model. Greedy texts stay what they
are, and sampled ones keep their distribution (arXiv 2211.17192). Rows may be right about different
numbers of tokens; what is wrong stays in the cache as a gap that the mask hides.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core.generation import filters
from opt_core.generation.request import Ids, Request, check_logits
from opt_core.generation.rules import Rules
from opt_core.generation.speculation import Counts, Reader, Rows, speculate
from opt_torch.cache import KVCache
from opt_torch.generation import loop, sampling
from opt_torch.generation.prefill import read_prompts
from opt_torch.linear import packed

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM


@torch.no_grad()
def stream(model: "OPTForCausalLM", request: Request) -> Iterator[Tensor]:
    """Drafts, checks and yields until every row has ended.

    Args:
        model: The language model.
        request: What to generate, with an assistant or `prompt_lookup_num_tokens`.

    Yields:
        (B * num_return_sequences,) ids, `pad_token_id` in rows that have ended; several in a row
        where drafts were right.
    """
    new, device = request.new_tokens, model.device
    reader = partial(_Reader, generator=sampling.random_source(model, request.seed)(0))
    with packed(model, new), packed(request.assistant or model, new):
        for column in speculate(model, request, reader):
            yield torch.as_tensor(column, device=device).long()


def generate(model: "OPTForCausalLM", request: Request) -> Tensor:
    """The prompts and all that `stream` yields after them."""
    found = request.join(column.cpu() for column in stream(model, request))
    return torch.as_tensor(found, device=model.device).long()


def accept_draft(
    scores_RTV: Tensor,
    draft_RG: Tensor,
    counts_R: Tensor,
    probs_RGV: Tensor | None,
    rules: Rules,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Which drafted tokens are right, and the token after them.

    A sampled token that its draft gave the probability q, and the model p, is right with
    probability min(1, p / q); the token after a wrong one is drawn from what p has more than q.

    Args:
        scores_RTV: Constrained logits of a row's next token, and of the one after each drafted.
        draft_RG: G = T - 1 ids.
        counts_R: How many of them were drafted.
        probs_RGV: The probabilities they were drawn by; None: they were not drawn.
        rules: Those of the request.
        generator: Source of random numbers.

    Returns:
        (R, T) ids and how many of them count, (R,): the drafted ones that are right and one
        token more.
    """
    (R, T, V), device = scores_RTV.shape, scores_RTV.device
    is_drafted = torch.arange(T - 1, device=device) < counts_R[:, None]
    if not rules.do_sample:
        tokens = scores_RTV.argmax(-1)
        right = is_drafted & (tokens[:, :-1] == draft_RG)
        return tokens, right.long().cumprod(1).sum(1) + 1
    p_RTV = probabilities(scores_RTV.flatten(0, 1), rules).view(R, T, V)
    # What was not drawn was certain.
    q_RGV = F.one_hot(draft_RG, V).float() if probs_RGV is None else probs_RGV
    p, q = (x.gather(2, draft_RG[..., None])[..., 0] for x in (p_RTV[:, :-1], q_RGV))
    chance = torch.rand(p.shape, generator=generator, device=device)
    right = (is_drafted & (chance * q < p)).long().cumprod(1).sum(1)
    row = torch.arange(R, device=device)
    q_RTV = F.pad(q_RGV * is_drafted[..., None], (0, 0, 0, 1))
    p_RV = p_RTV[row, right]
    rest = (p_RV - q_RTV[row, right]).clamp(min=0)
    # Where rounding alone refused a token, nothing is left.
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p_RV)
    tokens = F.pad(draft_RG, (0, 1))
    tokens[row, right] = _draw(rest, generator)
    return tokens, right + 1


def probabilities(logits_BV: Tensor, rules: Rules) -> Tensor:
    """Probabilities (B, V) that sampling draws the next token by."""
    logits_BC, ids_BC = filters.candidates(sampling, logits_BV, rules)
    return torch.zeros_like(logits_BV).scatter_(1, ids_BC, F.softmax(logits_BC, -1))


class _Reader(Reader):
    """A model and what it has read."""

    def __init__(
        self,
        model: "OPTForCausalLM",
        request: Request,
        rows: Rows,
        slots: int,
        generator: torch.Generator,
    ):
        super().__init__(model, request, rows, slots)
        self.generator = generator
        self.rules = sampling.request_rules(model, request)
        copies = request.settings.num_return_sequences
        self.logits, cache = read_prompts(model, request, slots, copies)
        self.keys, self.values = cache.keys, cache.values

    def first_tokens(self) -> Ids:
        scores = self._constrained(self.logits[:, None], self.rows.no_draft)[:, 0]
        check_logits(scores.amax(-1).cpu().numpy())
        return _array(filters.select_tokens(sampling, scores, self.rules, self.generator))

    def propose(self, count: int, step: int) -> tuple[Ids, Tensor | None]:
        rows, draft, drawn = self.rows, self.rows.no_draft, []
        count = min(count, int(rows.wanted.max()))
        new, places, length = rows.newest(2), self.positions(count + 1, 2), self.slots.length
        for i in range(count):
            ahead = places[:, i + 2 - new.shape[1] : i + 2]
            logits = self._read(new, ahead, length)[:, -1:]
            scores = self._constrained(logits, draft)[:, -1]
            length += new.shape[1]
            if self.rules.do_sample:
                drawn.append(probabilities(scores, self.rules))
                token = _draw(drawn[-1], self.generator)
            else:
                token = scores.argmax(-1)
            new = _array(token)[:, None]
            draft = np.concatenate([draft, new], 1)
        return draft, torch.stack(drawn, 1) if drawn else None

    def check(
        self, draft: Ids, counts: Counts, probs: Tensor | None, step: int
    ) -> tuple[Ids, Counts]:
        draft = draft[:, : counts.max()]
        ids = np.concatenate([self.rows.newest(1), draft], 1)
        logits = self._read(ids, self.positions(ids.shape[1], 1), self.slots.length)
        device = logits.device
        tokens, kept = accept_draft(
            self._constrained(logits, draft),
            torch.as_tensor(draft, device=device).long(),
            torch.as_tensor(counts, device=device),
            probs,
            self.rules,
            self.generator,
        )
        return _array(tokens), _array(kept)

    def reorder(self, order: Ids) -> None:
        places = torch.as_tensor(order, device=self.model.device).long()[:, None, :, None]
        self.keys, self.values = (
            tuple(buffer.gather(2, places.expand_as(buffer)) for buffer in buffers)
            for buffers in (self.keys, self.values)
        )

    def _read(self, ids_RT: Ids, positions_RT: Ids, length: int) -> Tensor:
        """Logits (R, T, V) after each of these tokens, which come behind what was read."""
        decoder, device, mask = self.model.get_decoder(), self.model.device, None
        ids, places = (torch.as_tensor(x, device=device) for x in (ids_RT, positions_RT))
        if not self.slots.is_plain:
            end = length + ids.shape[1]
            mask = torch.as_tensor(self.slots.mask[:, :end], device=device)
        cache = KVCache(self.keys, self.values, length)
        out = decoder(decoder.embed_tokens(ids), places, mask, cache)
        return self.model.compute_logits(out.last_hidden_state)

    def _constrained(self, logits_RTV: Tensor, draft_RG: Ids) -> Tensor:
        """Constrained logits (R, T, V) of the tokens after the last T of a row and its draft."""
        (R, T, V), device = logits_RTV.shape, logits_RTV.device
        ids, mask, made = (
            torch.as_tensor(x[:, -T:].reshape(R * T, *x.shape[2:]), device=device)
            for x in self.histories(draft_RG)
        )
        is_first = not self.rows.made.any()
        scores = loop.mask_vocabulary(logits_RTV.flatten(0, 1), self.rules.vocabulary)
        is_last = made + 1 == self.rules.new_tokens
        made = 0 if is_first else made
        scores = filters.process_logits(
            sampling, scores, ids.long(), mask, ids.shape[1], made, self.rules, is_last
        )
        return scores.view(R, T, V)


def _array(ids: Tensor) -> Ids:
    return ids.int().cpu().numpy()


def _draw(probabilities_BV: Tensor, generator: torch.Generator) -> Tensor:
    B, V = probabilities_BV.shape
    ids = torch.arange(V, device=probabilities_BV.device).expand(B, V)
    return sampling.draw_tokens(probabilities_BV.log(), ids, generator)
