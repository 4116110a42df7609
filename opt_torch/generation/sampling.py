"""Choosing the next token: filters of logits and draws, all pure functions.

Their meanings are those of `transformers`; `opt_core.generation.filters` says their order. What a
row has so far is given as ids (B, S) with a bool mask (B, S) that is False at padding, `end` of the
slots in use.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core.generation.request import Request
from opt_core.generation.rules import BANNED, TOP_H_TOKENS, Rules, make_rules
from opt_torch import sharding

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM


def request_rules(model: "OPTForCausalLM", request: Request) -> Rules:
    """The rules of a request, their arrays on the model's device, their numbers Python's own."""
    structure, numbers = make_rules(request, is_compiled=False)
    on_device = {
        name: torch.as_tensor(value, device=model.device) if value.ndim else value.item()
        for name, value in numbers.items()
    }
    return Rules(structure, on_device)


def random_source(model: "OPTForCausalLM", seed: int) -> Callable[[int], torch.Generator]:
    """The source that the token of each number is drawn from, alike on all processes of a mesh."""
    generator = torch.Generator(model.device).manual_seed(sharding.agree(seed, model.mesh))
    return lambda made: generator


def draw_seed(source: torch.Generator | None = None) -> int:
    """A seed out of a generator; None: PyTorch's own, so that `torch.manual_seed` decides it."""
    return int(torch.randint(2**63 - 1, (), generator=source))


def add_bias(logits_BV: Tensor, bias_V: Tensor) -> Tensor:
    """Adds to the logit of each id, in all rows alike or (B, V)."""
    return logits_BV + bias_V


def add_biases(logits_BV: Tensor, ids: Tensor, is_meant: Tensor, bias: Tensor) -> Tensor:
    """Adds to the logits of some ids in the rows that are meant; ids may come more than once."""
    return logits_BV.index_add(1, ids, torch.where(is_meant, bias, 0))


def repetition_penalty(
    logits_BV: Tensor, ids_BS: Tensor, mask_BS: Tensor, penalty: float
) -> Tensor:
    """Makes tokens that the row already has less likely (CTRL, arXiv 1909.05858)."""
    seen_BV = _mark(logits_BV, ids_BS, mask_BS)
    penalised = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, penalised, logits_BV)


def ban_marked(logits_BV: Tensor, ids_BS: Tensor, marks_BS: Tensor) -> Tensor:
    """Bans the ids that are marked."""
    return logits_BV.masked_fill(_mark(logits_BV, ids_BS, marks_BS), BANNED)


def ban_end(
    logits_BV: Tensor, mask_BS: Tensor, least: int, is_early: bool | Tensor, ends_V: Tensor
) -> Tensor:
    """Bans the ends of rows that have fewer than `least` tokens, or for which it is too early."""
    is_short_B = (mask_BS.sum(1) < least) | is_early
    return logits_BV.masked_fill(is_short_B[:, None] & ends_V, BANNED)


def force_tokens(logits_BV: Tensor, forced_V: Tensor, is_time: bool | Tensor) -> Tensor:
    """Lets nothing but some tokens come, all alike, in the rows for which it is time."""
    is_time = torch.as_tensor(is_time, device=logits_BV.device).reshape(-1, 1)
    forced_V = torch.zeros_like(logits_BV[0]).masked_fill(~forced_V, BANNED)
    return torch.where(is_time, forced_V, logits_BV)


def repair(logits_BV: Tensor) -> Tensor:
    """Finite numbers in place of what is none: 0 for NaN, the largest and smallest there are."""
    return logits_BV.nan_to_num(0.0)


def favour_end(
    logits_BV: Tensor, power: int | Tensor, factor: float | Tensor, ends_V: Tensor
) -> Tensor:
    """Makes the ends likelier by a factor to a power, in rows in which that is positive."""
    power = torch.as_tensor(power, device=logits_BV.device).reshape(-1, 1)
    extra = logits_BV.abs() * (factor**power - 1)
    is_meant = (power > 0) & ends_V & logits_BV.isfinite()
    return torch.where(is_meant, logits_BV + extra, logits_BV)


def normalize(logits_BV: Tensor) -> Tensor:
    """Their log-probabilities."""
    return F.log_softmax(logits_BV, -1)


def token_before(ids_BS: Tensor, mask_BS: Tensor, end: int, back: int) -> tuple[Tensor, Tensor]:
    """The tokens so many slots before `end`, and whether they are there and real, (B,)."""
    place = max(end - back, 0)
    return ids_BS[:, place], mask_BS[:, place] & (end >= back)


def shift(values_BS: Tensor, count: int) -> Tensor:
    """Each slot's value so many slots before it; 0 or False where there is none."""
    S = values_BS.shape[1]
    return F.pad(values_BS, (count, 0))[:, :S]


def sort_logits(logits_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits, in descending order, and their ids."""
    return torch.topk(logits_BV, count)


def top_h(logits_BC: Tensor, share: float, fewest: int) -> Tensor:
    """Keeps the likeliest tokens that bear a share of the entropy (arXiv 2509.02510)."""
    p = F.softmax(logits_BC[:, :TOP_H_TOKENS], -1)
    entropy = torch.special.entr(p).cumsum(-1)
    missing = logits_BC.shape[1] - p.shape[1]
    is_kept = F.pad(entropy <= share * entropy[:, -1:], (0, missing))
    return _keep(logits_BC, is_kept, fewest)


def top_k(logits_BC: Tensor, k: int, fewest: int) -> Tensor:
    """Keeps the k likeliest tokens; logits in descending order, as for all that follow."""
    places = torch.arange(logits_BC.shape[1], device=logits_BC.device)
    return _keep(logits_BC, (places < k).expand(logits_BC.shape), fewest)


def top_p(logits_BC: Tensor, p: float, fewest: int) -> Tensor:
    """Keeps the fewest likeliest tokens whose probabilities reach p."""
    probabilities = F.softmax(logits_BC, -1)
    before = probabilities.cumsum(-1) - probabilities
    return _keep(logits_BC, before < p, fewest)


def min_p(logits_BC: Tensor, p: float, fewest: int) -> Tensor:
    """Keeps tokens at least p times as likely as the likeliest."""
    share = torch.exp(logits_BC - logits_BC[:, :1])
    return _keep(logits_BC, share >= p, fewest)


def typical_p(logits_BC: Tensor, p: float, fewest: int) -> Tensor:
    """Keeps the tokens of nearly expected information, until their probabilities exceed p."""
    information = -F.log_softmax(logits_BC, -1)
    distance = (information - _entropy(logits_BC)).abs()
    nearest, order = distance.sort(dim=-1, stable=True)
    ordered = F.softmax(logits_BC, -1).gather(-1, order)
    count = (ordered.cumsum(-1) < p).sum(-1, keepdim=True)
    furthest = nearest.gather(-1, count.clamp(fewest - 1, logits_BC.shape[-1] - 1))
    return logits_BC.masked_fill(distance > furthest, BANNED)


def epsilon_cutoff(logits_BC: Tensor, least: float, fewest: int) -> Tensor:
    """Keeps tokens at least so probable (arXiv 2210.15191)."""
    return _keep(logits_BC, F.softmax(logits_BC, -1) >= least, fewest)


def eta_cutoff(logits_BC: Tensor, least: float, fewest: int) -> Tensor:
    """Keeps tokens at least so probable, or fewer where much is possible (arXiv 2210.15191)."""
    eta = least**0.5 * (-_entropy(logits_BC)).exp()
    return _keep(logits_BC, F.softmax(logits_BC, -1) >= eta.clamp(max=least), fewest)


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


def _mark(logits_BV: Tensor, ids_BS: Tensor, marks_BS: Tensor) -> Tensor:
    """A bool (B, V) that is True at the ids that are marked."""
    marked_BV = torch.zeros_like(logits_BV, dtype=torch.int32)
    return marked_BV.scatter_add_(1, ids_BS, marks_BS.to(torch.int32)) > 0


def _keep(logits_BC: Tensor, is_kept_BC: Tensor, fewest: int) -> Tensor:
    """Leaves out what is not kept, but for the first `fewest`."""
    is_left_out = ~is_kept_BC
    is_left_out[:, :fewest] = False
    return logits_BC.masked_fill(is_left_out, BANNED)


def _entropy(logits_BC: Tensor) -> Tensor:
    """Expected information of a draw, (B, 1)."""
    return torch.special.entr(F.softmax(logits_BC, -1)).sum(-1, keepdim=True)
