"""Choosing the next token: filters of logits and draws, all pure functions.

Their meanings are those of `transformers`; `opt_core.generation.filters` says their order. What a
row has so far is given as ids (B, S) with a bool mask (B, S) that is False at padding, `end` of the
slots in use.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BANNED = float("-inf")


def repetition_penalty(
    logits_BV: Tensor, ids_BS: Tensor, mask_BS: Tensor, penalty: float
) -> Tensor:
    """Makes tokens that the row already has less likely (CTRL, arXiv 1909.05858)."""
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.int32)
    seen_BV.scatter_add_(1, ids_BS, mask_BS.to(torch.int32))
    penalised = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV > 0, penalised, logits_BV)


def no_repeat_ngram(
    logits_BV: Tensor, ids_BS: Tensor, mask_BS: Tensor, end: int, size: int
) -> Tensor:
    """Bans every token that would complete an n-gram the row already has."""
    before = size - 1
    if size > end:
        return logits_BV
    tail = ids_BS[:, end - before : end]
    # Window i is ids[i : i + size]: its first `before` ids are compared with the tail, and
    # its last one is banned.
    windows, kept = (x[:, :end].unfold(1, size, 1) for x in (ids_BS, mask_BS))
    repeats = kept.all(-1) & (windows[..., :before] == tail[:, None]).all(-1)
    banned_BV = torch.zeros_like(logits_BV, dtype=torch.int32)
    banned_BV.scatter_add_(1, windows[..., -1], repeats.to(torch.int32))
    return logits_BV.masked_fill(banned_BV > 0, BANNED)


def ban_word(
    logits_BV: Tensor, ids_BS: Tensor, mask_BS: Tensor, end: int, word: Sequence[int]
) -> Tensor:
    """Bans the last token of a word wherever the row ends in the rest of it."""
    *start, last = word
    if len(start) > end:
        return logits_BV
    tail, kept = (x[:, end - len(start) : end] for x in (ids_BS, mask_BS))
    matches = (tail == torch.tensor(start, dtype=tail.dtype, device=tail.device)).all(1)
    matches &= kept.all(1)
    logits_BV = logits_BV.clone()
    logits_BV[:, last].masked_fill_(matches, BANNED)
    return logits_BV


def ban_end(
    logits_BV: Tensor,
    mask_BS: Tensor,
    least: int,
    is_early: bool | Tensor,
    eos_ids: Sequence[int],
) -> Tensor:
    """Bans the ends of rows that have fewer than `least` tokens, or for which it is too early."""
    is_short_B = (mask_BS.sum(1) < least) | is_early
    return torch.where(is_short_B[:, None], ban_tokens(logits_BV, eos_ids), logits_BV)


def ban_tokens(logits_BV: Tensor, ids: Sequence[int]) -> Tensor:
    """Bans tokens in every row."""
    logits_BV = logits_BV.clone()
    logits_BV[:, list(ids)] = BANNED
    return logits_BV


def top_k(logits_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits, in descending order, and their ids."""
    return torch.topk(logits_BV, k)


def top_p(logits_BC: Tensor, p: float) -> Tensor:
    """Keeps the fewest likeliest tokens whose probabilities reach p; logits in descending order."""
    probabilities = F.softmax(logits_BC, -1)
    before = probabilities.cumsum(-1) - probabilities
    kept = before < p
    kept[:, 0] = True
    return logits_BC.masked_fill(~kept, BANNED)


def min_p(logits_BC: Tensor, p: float) -> Tensor:
    """Keeps tokens at least p times as likely as the likeliest; logits in descending order."""
    probabilities = F.softmax(logits_BC, -1)
    return logits_BC.masked_fill(probabilities < p * probabilities[:, :1], BANNED)


def typical_p(logits_BC: Tensor, p: float) -> Tensor:
    """Keeps the tokens of nearly expected information, until their probabilities exceed p."""
    information = -F.log_softmax(logits_BC, -1)
    probabilities = F.softmax(logits_BC, -1)
    entropy = torch.where(probabilities > 0, probabilities * information, 0).sum(-1, keepdim=True)
    distance, order = (information - entropy).abs().sort(dim=-1, stable=True)
    count = (probabilities.gather(-1, order).cumsum(-1) < p).sum(-1, keepdim=True)
    furthest = distance.gather(-1, count.clamp(max=logits_BC.shape[-1] - 1))
    return logits_BC.masked_fill((information - entropy).abs() > furthest, BANNED)


def draw_tokens(logits_BC: Tensor, ids_BC: Tensor, generator: torch.Generator) -> Tensor:
    """Draws one of the candidates in each row, (B,) ids."""
    probabilities = F.softmax(logits_BC, -1)
    # argmax(p / Exp(1)) draws from p without asking the device for a result, unlike multinomial.
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    choice = (probabilities / noise).argmax(-1, keepdim=True)
    return ids_BC.gather(-1, choice)[:, 0]


def likeliest_tokens(logits_BV: Tensor) -> Tensor:
    """The likeliest token of each row, (B,) ids."""
    return logits_BV.argmax(-1)
