"""Beam search on the host: drawn beams, groups of beams, ends by texts or functions, and outputs.

The rules are those of the backends' `beam` modules, where plain searches are compiled.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opt_core.generation.hooks import Deadline
from opt_core.generation.observed import Steps
from opt_core.generation.request import Ids, Request, check_logits

NEG_INF = np.float32(-1.0e9)
"""Score of a place that holds no beam yet: finite, so that sums of it stay comparable."""

Scores = NDArray[np.float32]


class Hypothesis(NamedTuple):
    """A finished beam: its score, its ids (S,), its length, and the rows its tokens came from."""

    score: float
    ids: Ids
    length: int
    path: Ids


class Group:
    """Beams of one prompt that compete with one another.

    Args:
        rows: Their rows.
        settings: What to generate.
    """

    def __init__(self, rows: Ids, settings: Any) -> None:
        self.rows, self.settings = rows, settings
        self.scores = np.full(len(rows), NEG_INF, np.float32)
        # All beams start alike: only the first may be continued, or one text would come W times.
        self.scores[0] = 0
        self.finished: list[Hypothesis] = []
        self.is_open = True

    def extend(self, scores_WV: Scores, count: int, random: Any) -> tuple[Ids, Ids, Scores]:
        """The parents, tokens and scores of the best continuations, or of drawn ones."""
        totals = (scores_WV + self.scores[:, None]).ravel()
        # The `count` largest of totals with Gumbel's noise are draws without replacement.
        keys = totals if random is None else totals + random.gumbel(size=totals.shape)
        count = min(count, len(totals))
        best = np.argpartition(-keys, count - 1)[:count]
        best = best[np.argsort(-keys[best], kind="stable")]
        V = scores_WV.shape[1]
        return best // V, (best % V).astype(np.int32), totals[best]

    def finish(self, found: list[Hypothesis]) -> None:
        """Keeps the best of the finished ones and of these."""
        W = len(self.rows)
        if self.is_open and not (self.settings.early_stopping is True and self.is_full):
            both = [*self.finished, *found]
            self.finished = sorted(both, key=lambda one: -one.score)[:W]

    @property
    def is_full(self) -> bool:
        """Whether as many beams are finished as are wanted."""
        return len(self.finished) == len(self.rows)

    def update(self, made: int, limit: int) -> None:
        """Closes the group where no open beam can become one of the best."""
        settings = self.settings
        is_longer_better = settings.early_stopping == "never" and settings.length_penalty > 0
        length = limit if is_longer_better else made
        best = float(self.scores[0]) / length**settings.length_penalty
        worst = min((one.score for one in self.finished), default=NEG_INF)
        can_improve = best > worst or not self.is_full
        if settings.early_stopping is True and self.is_full:
            can_improve = False
        self.is_open = self.is_open and can_improve


def search(model: Any, request: Request) -> Any:
    """The best rows of each prompt, (B * num_return_sequences, T + new) ids or a `GenerateOutput`.

    Raises:
        GenerationError: No token can come in a row.
    """
    settings = request.settings
    (B, prompt), W, new = request.ids.shape, settings.num_beams, request.new_tokens
    steps, size = Steps(model, request, W), W // settings.num_beam_groups
    starts = [range(b * W, (b + 1) * W, size) for b in range(B)]
    prompts = [
        [Group(np.arange(s, s + size, dtype=np.int32), settings) for s in row] for row in starts
    ]
    random = np.random.default_rng(request.seed) if settings.do_sample else None
    deadline = Deadline(settings.max_time)
    paths: Ids = np.zeros((B * W, 0), np.int32)
    count = max(2, 1 + len(settings.eos_ids)) * size
    while steps.made < new and any(group.is_open for groups in prompts for group in groups):
        scores = steps.constrain(steps.backend.sampling.normalize(steps.logits()))
        numbers: Any = steps.draw(scores)[1] if settings.do_sample else steps.array(scores)
        if steps.made == 0:
            check_logits(numbers.max(1))
        if settings.output_scores:
            steps.kept["scores"].append(steps.tensor(numbers))
        is_last = steps.made + 1 == new or deadline.is_over
        parents: Ids = np.arange(B * W, dtype=np.int32)
        tokens: Ids = np.zeros(len(parents), np.int32)
        for groups in prompts:
            taken: Any = np.zeros(numbers.shape[1], np.float32)
            for group in groups:
                own = numbers[group.rows] - settings.diversity_penalty * taken
                _grow(steps, group, own, count, random, paths, is_last, parents, tokens)
                np.add.at(taken, tokens[group.rows], 1)
        steps.select(parents)
        paths = np.concatenate([paths[parents], parents[:, None]], 1)
        steps.add(tokens)
        for groups in prompts:
            for group in groups:
                group.update(steps.made, new)
        if is_last:
            break
    return _result(steps, prompts, prompt)


def _grow(
    steps: Steps, group: Group, scores_WV: Scores, count: int, random: Any, paths: Ids,
    is_last: bool, parents: Ids, tokens: Ids,
) -> None:  # fmt: skip
    """Continues the beams of a group: notes who ended, and writes who goes on into the arrays."""
    size, made = len(group.rows), steps.made + 1
    above, new, totals = group.extend(scores_WV, count, random)
    rows = group.rows[above]
    histories = steps.history[rows]
    histories[:, steps.end] = new
    ends = np.isin(new, steps.settings.eos_ids) | is_last | _stops(steps, histories)
    power = made**steps.settings.length_penalty
    # Only a beam among the W best continuations may finish; the others are reserves.
    group.finish([
        Hypothesis(
            float(totals[i]) / power, histories[i], made, np.append(paths[rows[i]], rows[i])
        )
        for i in np.flatnonzero(ends[:size])
    ])  # fmt: skip
    goes_on = np.argsort(ends, kind="stable")[:size]
    group.scores = np.where(ends[goes_on], NEG_INF, totals[goes_on])
    parents[group.rows], tokens[group.rows] = rows[goes_on], new[goes_on]


def _stops(steps: Steps, histories: Ids) -> NDArray[np.bool_]:
    """Whether texts or functions end these rows, their newest tokens in place."""
    request, found = steps.request, np.zeros(len(histories), bool)
    if request.settings.stops:
        for row, tracker in enumerate(request.stop_trackers(len(histories))):
            new = histories[row, steps.prompt : steps.end + 1].tolist()
            found[row] = [tracker.push(token) for token in new][-1]
    if not request.hooks.is_empty:
        ids = steps.tensor(histories[:, : steps.end + 1])
        found |= request.hooks.stops(ids, None)
    return found


def _result(steps: Steps, prompts: list[list[Group]], prompt: int) -> Any:
    """Each prompt's best rows, cut to the longest of them."""
    count, pad = steps.settings.num_return_sequences, steps.request.pad
    best: list[Hypothesis] = []
    for groups in prompts:
        found = [one for group in groups for one in group.finished]
        best += sorted(found, key=lambda one: -one.score)[:count]
    longest = max(one.length for one in best)
    ids = np.full((len(best), prompt + longest), pad, np.int32)
    paths = np.full((len(best), longest), -1, np.int32)
    for row, one in enumerate(best):
        ids[row, : prompt + one.length] = one.ids[: prompt + one.length]
        paths[row, : one.length] = one.path
    more: dict[str, Any] = {"beam_indices": steps.tensor(paths)}
    if steps.settings.output_scores:
        scores = np.array([one.score for one in best], np.float32)
        more["sequences_scores"] = steps.tensor(scores)
    return steps.result(ids, **more)
