"""The engine of serving: rows of one cache, each of its own length and with rules of its own.

`opt_core.serving.scheduler` says what it does when.
"""

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from opt_core.generation import filters
from opt_core.generation.request import Request
from opt_core.generation.rules import Rules
from opt_core.serving import engine
from opt_core.serving.engine import ALTERNATIVES, Chosen, Scores, Table
from opt_torch import linear
from opt_torch.cache import KVCache
from opt_torch.generation import loop, sampling
from opt_torch.generation.fast_decode import make_rows_step
from opt_torch.serving.cache import RowsCache

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM


class Engine(engine.Engine):
    """A model with a cache of R rows; see `opt_core.serving.engine.Engine`."""

    is_compiled: ClassVar[bool] = False

    def __init__(self, model: "OPTForCausalLM", slots: int):
        super().__init__(model, slots)
        cache = model.init_cache(slots, self.width)
        self.keys, self.values = cache.keys, cache.values
        self.rules: dict[int, tuple[Rules, torch.Generator]] = {}
        with torch.no_grad():
            self.orders = linear.pack(model, (torch.float32, torch.bfloat16))
            with linear.using(self.orders):
                self.lean_step = make_rows_step(model)

    def place(self, slot: int, request: Request) -> None:
        """Gives a row another request's rules, and its own source of random numbers."""
        generator = torch.Generator(self.model.device).manual_seed(request.seed)
        self.rules[slot] = sampling.request_rules(self.model, request), generator

    def resize(self, width: int) -> None:
        """Gives every row another number of cache slots."""
        cache = KVCache(self.keys, self.values, min(width, self.width)).resize(self.slots, width)
        self.keys, self.values, self.width = cache.keys, cache.values, width

    @torch.no_grad()
    def copy(self, source: int, target: int, count: int) -> None:
        """Copies the first tokens of one row's cache to another row."""
        for buffer in (*self.keys, *self.values):
            buffer[target, :, :count] = buffer[source, :, :count]

    @torch.no_grad()
    def read(
        self, table: Table, slot: int, start: int, end: int, chunk: int, scores_prompt: bool
    ) -> tuple[Chosen | None, Scores | None]:
        """Reads some tokens of a row into its cache."""
        decoder, row = self.model.get_decoder(), slice(slot, slot + 1)
        keys, values = (tuple(x[row] for x in buffers) for buffers in (self.keys, self.values))
        ids = self._tensor(table.ids[row, start:end])
        with linear.using(self.orders):
            out = decoder(decoder.embed_tokens(ids), None, None, KVCache(keys, values, start))
        hidden, scores = out.last_hidden_state[0], None
        if scores_prompt:
            following = self._tensor(table.ids[slot, start + 1 : min(end + 1, table.counts[slot])])
            scores = _scores(self.model.compute_logits(hidden[: len(following)]), following)
        if end < table.counts[slot]:
            return None, scores
        return self._choose(table, [slot], self.model.compute_logits(hidden[-1:])), scores

    @torch.no_grad()
    def step(self, table: Table) -> Chosen:
        """Reads the newest token of every active row and chooses the next."""
        active = np.flatnonzero(table.is_active)
        slots = active.tolist()
        if self.lean_step is not None:
            newest, places = self._tensor(table.newest[active]), table.held[active].tolist()
            logits = self.lean_step(newest, self.keys, self.values, slots, places)
        else:
            logits = self._step(table, active)
        chosen = self._choose(table, slots, logits)
        tokens, best, *scores = (
            _spread(values, active, self.slots)
            for values in (chosen.tokens, chosen.best, *chosen.scores)
        )
        return Chosen(tokens, best, Scores(*scores))

    def _step(self, table: Table, active: np.ndarray) -> Tensor:
        """Logits (X, V) behind the newest token of every active row, by the model's modules."""
        # Rows between two active ones are computed too: buffers are cut, not copied.
        rows = slice(int(active[0]), int(active[-1]) + 1)
        length = int(table.counts[active].max()) - 1
        places = self._tensor(table.held[rows])
        seen = torch.arange(length + 1, device=places.device) <= places[:, None]
        positions = places.clamp(max=length)[:, None]
        keys, values = (tuple(x[rows] for x in buffers) for buffers in (self.keys, self.values))
        decoder, cache = self.model.get_decoder(), RowsCache(keys, values, length, places=places)
        embeds = decoder.embed_tokens(self._tensor(table.newest[rows])[:, None])
        out = decoder(embeds, positions, seen, cache)
        hidden = out.last_hidden_state[self._tensor(active) - rows.start, 0]
        return self.model.compute_logits(hidden)

    def _choose(self, table: Table, slots: list[int], logits_RV: Tensor) -> Chosen:
        """Chooses as each row alone would, (1, V) logits at a time."""
        tokens: list[Tensor] = []
        best: list[Tensor] = []
        wanted = [i for i, slot in enumerate(slots) if table.is_scored[slot]]
        raw_XV = logits_RV[wanted]
        for i, slot in enumerate(slots):
            rules, generator = self.rules[slot]
            end, made = int(table.counts[slot]), int(table.made[slot])
            ids = self._tensor(table.ids[slot : slot + 1, :end])
            logits = loop.mask_vocabulary(logits_RV[i : i + 1], rules.vocabulary)
            logits = filters.process_logits(
                *(sampling, logits, ids, torch.ones_like(ids, dtype=torch.bool), end, made, rules)
            )
            best.append(logits.amax(-1))
            tokens.append(filters.select_tokens(sampling, logits, rules, generator))
        found = torch.cat(tokens)
        scores = _scores(raw_XV, found[wanted])
        return Chosen(
            found.int().cpu().numpy(), torch.cat(best).cpu().numpy(),
            Scores(*(_spread(x, np.array(wanted, int), len(slots)) for x in scores)),
        )  # fmt: skip

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, device=self.model.device).long()


def _scores(logits_XV: Tensor, ids_X: Tensor) -> Scores:
    """How likely each of some tokens is, and the likeliest at its place."""
    logprobs_XV = logits_XV.float().log_softmax(-1)
    best, ids = logprobs_XV.topk(min(ALTERNATIVES, logits_XV.shape[1]))
    logprob = logprobs_XV.gather(1, ids_X[:, None])[:, 0]
    return Scores(logprob.cpu().numpy(), ids.int().cpu().numpy(), best.cpu().numpy())


def _spread(values_X: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """The values of some of so many rows, zeros for the others."""
    spread = np.zeros((count, *values_X.shape[1:]), values_X.dtype)
    spread[rows] = values_X
    return spread
