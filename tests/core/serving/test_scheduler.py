"""The scheduler against an engine of a few lines that checks what it is told."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_core.config import OPTConfig
from opt_core.errors import GenerationError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.request import check_request
from opt_core.serving import engine
from opt_core.serving.engine import ALTERNATIVES, Chosen, Scores
from opt_core.serving.row import Row
from opt_core.serving.scheduler import LONG_PATIENCE, PATIENCE, WORTHWHILE, Scheduler

WINDOW, V, END = 256, 50, 7
CONFIG = OPTConfig(
    vocab_size=V, hidden_size=8, num_attention_heads=2, ffn_dim=8, num_hidden_layers=1,
    max_position_embeddings=WINDOW,
)  # fmt: skip


def following(text) -> int:
    """The token that comes after a text."""
    return (sum((i + 1) * int(token) for i, token in enumerate(text)) * 7919 + len(text)) % V


class Engine(engine.Engine):
    """Caches of token ids; what is read must be what was written."""

    is_compiled = False

    def __init__(self, slots: int):
        config = SimpleNamespace(config=CONFIG, attn_implementation="sdpa")
        super().__init__(config, slots)
        self.caches = np.full((slots, self.width), -1)
        self.placed: list[Any] = [None] * slots
        self.read_tokens: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.failing: set[int] = set()

    def place(self, slot, request):
        self.placed[slot] = request

    def resize(self, width):
        wider = np.full((self.slots, width), -1)
        count = min(width, self.width)
        wider[:, :count] = self.caches[:, :count]
        self.caches, self.width = wider, width

    def copy(self, source, target, count):
        self.caches[target, :count] = self.caches[source, :count]

    def read(self, table, slot, start, end, chunk, scores_prompt):
        assert 0 < end - start <= chunk
        assert start + chunk <= self.width
        self.caches[slot, start : start + chunk] = -1
        self.caches[slot, start:end] = table.ids[slot, start:end]
        self.read_tokens.append(end - start)
        self.sizes.append((end - start, chunk))
        scores = Scores(
            *(
                np.arange(start, end + 1).repeat(n).reshape(-1, *s)
                for n, s in ((1, ()), (5, (5,)), (5, (5,)))
            )
        )
        chosen = None
        if end == table.counts[slot]:
            chosen = self._chosen([self.caches[slot, :end]], [slot])
        return chosen, scores if scores_prompt else None

    def step(self, table):
        texts = []
        for slot in range(self.slots):
            # What no row needs is written to, as in a program of one shape.
            place = table.held[slot]
            self.caches[slot, place] = table.newest[slot] if table.is_active[slot] else -1
            texts.append(self.caches[slot, : place + 1])
            assert not table.is_active[slot] or (texts[-1] >= 0).all()
        return self._chosen(texts, range(self.slots))

    def _chosen(self, texts, slots):
        n = len(texts)
        best = np.array([np.nan if slot in self.failing else 0.0 for slot in slots])
        scores = Scores(np.zeros(n), np.zeros((n, ALTERNATIVES), int), np.zeros((n, ALTERNATIVES)))
        return Chosen(np.array([following(text) for text in texts]), best, scores)


def make_row(prompt, new=5, eos=None, **marks) -> Row:
    request = check_request(
        CONFIG, GenerationConfig(eos_token_id=eos), np.array([prompt], np.int32), None, None, 0,
        None, max_new_tokens=new,
    )  # fmt: skip
    return Row(request, **marks)


def make_scheduler(slots, **options) -> Any:
    return Scheduler(Engine(slots), **options)


def alone(row) -> list[int]:
    """The tokens that a row must have."""
    text, ends = list(row.prompt), row.request.settings.eos_ids
    for _ in range(row.request.new_tokens):
        text.append(following(text))
        if text[-1] in ends:
            break
    return text[len(row.prompt) :]


def run(scheduler) -> list[Any]:
    events = []
    while not scheduler.is_idle:
        events += scheduler.step()
    return events


PROMPTS = st.builds(
    lambda beginning, length, seed: (
        [9] * beginning + np.random.default_rng(seed).integers(10, V, length).tolist()
    ),
    st.sampled_from([0, 0, 20, 100]),
    st.integers(1, 100),
    st.integers(0, 3),
)
VISITS = st.tuples(PROMPTS, st.integers(1, 50), st.booleans(), st.integers(0, 4), st.booleans())


@settings(max_examples=30, deadline=None)
@given(visits=st.lists(VISITS, min_size=1, max_size=14), slots=st.integers(1, 4))
def test_rows_that_come_and_go_get_what_they_get_alone(visits, slots):
    """Cancelled rows too, as far as they come; caches grow and shrink meanwhile."""
    scheduler, rows, events = make_scheduler(slots, chunk=32), [], []
    for prompt, new, ends, pause, is_cancelled in visits:
        rows.append(make_row(prompt, new, END if ends else None, scores_prompt=len(prompt) == 9))
        scheduler.submit(rows[-1])
        for _ in range(pause):
            events += scheduler.step()
        rows[-1].is_cancelled = is_cancelled
    events += run(scheduler)
    for row in rows:
        assert row.made == [e.token for e in events if e.row is row and e.token is not None]
        if row.ended == "cancelled":
            assert row.made == alone(row)[: len(row.made)]
        else:
            assert row.made == alone(row)
            has_ended = row.made[-1] == END and END in row.request.settings.eos_ids
            assert row.ended == ("stop" if has_ended else "length")
    scored = [row for row in rows if row.scores_prompt and row.made]
    for row in scored:
        assert [score.logprob for score in row.prompt_scores] == list(range(len(row.prompt) - 1))


def test_a_row_can_fill_the_window():
    """There is no room for whole chunks at its end: some tokens are read twice."""
    scheduler = make_scheduler(2, chunk=48)
    rows = [
        make_row([3] * WINDOW, 1, scores_prompt=True),
        make_row([4] * (WINDOW - 30), 31),
        make_row([4] * (WINDOW - 3), 2),  # begins as the last one, at no whole chunk
        make_row([5], WINDOW),
    ]
    for row in rows:
        scheduler.submit(row)
    run(scheduler)
    assert [row.made for row in rows] == [alone(row) for row in rows]
    assert [score.logprob for score in rows[0].prompt_scores] == list(range(WINDOW - 1))


def test_a_long_prompt_keeps_nobody_waiting():
    scheduler = make_scheduler(3, chunk=16)
    short, long = make_row([3], 40), make_row([4] * 160, 1)
    scheduler.submit(short)
    scheduler.step()
    scheduler.submit(long)
    for step in range(10):
        assert not long.made
        scheduler.step()  # 15 tokens are left to read at first
        scheduler.step()
        assert len(short.made) == step + 2
    scheduler.step()
    assert scheduler.engine.read_tokens == [1, 15, *[16] * 9, 1]
    assert long.ended == "length"


def test_a_first_token_is_told_before_another_prompt_is_read():
    scheduler = make_scheduler(3, chunk=64)
    rows = [make_row([token] * 20, 9) for token in (3, 4)]
    for row in rows:
        scheduler.submit(row)
    for row in rows:
        assert [(event.row, event.token) for event in scheduler.step()] == [(row, alone(row)[0])]
    assert [event.row for event in scheduler.step()] == rows  # nothing is left to read


def test_short_prompts_come_first_and_long_ones_come():
    scheduler = make_scheduler(3, chunk=16)
    long, short = make_row([3] * 100, 1), make_row([4] * 9, 1)
    for row in (long, short):
        scheduler.submit(row)
    scheduler.step()
    assert short.ended
    assert not long.ended
    crowd = [make_row([5 + i % 2] * 16, 1) for i in range(60)]
    for row in crowd:
        scheduler.submit(row)
    while not long.ended:
        scheduler.step()
    assert sum(row.ended is None for row in crowd) > 20


def test_a_beginning_is_read_once():
    scheduler = make_scheduler(3)
    beginning = list(range(10, 40)) * 5
    rows = [make_row([*beginning, i, i, i]) for i in range(3, 6)]
    for row in rows:
        scheduler.submit(row)
    run(scheduler)
    assert sum(scheduler.engine.read_tokens) == len(beginning) + 3 * 3
    again = make_row([*beginning, 8])
    scheduler.submit(again)  # those who read it are gone
    run(scheduler)
    assert scheduler.engine.read_tokens[-1] == 1
    short = make_row([*beginning[: WORTHWHILE - 1], 3])
    scheduler.submit(short)  # not worth a copy
    run(scheduler)
    assert scheduler.engine.read_tokens[-1] == WORTHWHILE
    assert [row.made for row in (*rows, again, short)] == [
        alone(row) for row in (*rows, again, short)
    ]


def test_a_cancelled_row_frees_its_slot_at_the_next_step():
    scheduler = make_scheduler(1)
    first, second, third = make_row([3], 50), make_row([4], 2), make_row([5], 2)
    for row in (first, second, third):
        scheduler.submit(row)
    scheduler.step()
    first.is_cancelled = third.is_cancelled = True
    events = scheduler.step()
    assert [(e.row, e.token) for e in events[:2]] == [(third, None), (first, None)]
    assert first.ended == third.ended == "cancelled"
    assert second.made == alone(second)[:1]


def test_a_row_that_goes_wrong_harms_no_other():
    scheduler = make_scheduler(2)
    rows = [make_row([3], 9), make_row([4], 9)]
    for row in rows:
        scheduler.submit(row)
    scheduler.step()
    scheduler.engine.failing.add(0)
    run(scheduler)
    assert rows[0].ended == "error"
    assert rows[0].error == "no token can be generated: the logits are NaN"
    assert rows[1].made == alone(rows[1])


def test_caches_are_as_wide_as_is_needed():
    scheduler = make_scheduler(2)
    scheduler.submit(make_row([3] * 200, 2))
    run(scheduler)
    assert scheduler.engine.width == 256
    for is_compiled, patience in ((False, LONG_PATIENCE), (True, PATIENCE)):
        scheduler.engine.is_compiled = is_compiled
        scheduler.submit(make_row([4], 2 * PATIENCE))
        run(scheduler)
        assert scheduler.engine.width == (256 if patience > 2 * PATIENCE else 128)


def test_programs_read_a_part_of_a_chunk_or_all_of_it():
    """All of it where nothing of it was read and more than half of it is left."""
    scheduler = make_scheduler(2, chunk=128)
    scheduler.engine.is_compiled = True
    rows = [make_row([3] * 230, 2), make_row([4] * 10, 2)]
    for row in rows:
        scheduler.submit(row)
    for _ in rows:
        scheduler.step()
    assert scheduler.engine.sizes == [(10, 64), (64, 64)]
    run(scheduler)
    assert scheduler.engine.sizes[2:] == [(128, 128), (38, 64)]
    assert [row.made for row in rows] == [alone(row) for row in rows]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 3}, "num_beams is not served"),
        ({"typical_p": 0.5, "do_sample": True}, "typical_p is not served"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size is not served"),
        ({"bad_words_ids": [[3, 4]]}, "for single tokens only"),
        ({"do_sample": True, "num_return_sequences": 2}, "one prompt and one text"),
    ],
)
def test_settings_that_rows_cannot_have(changes, message):
    request = make_row([3]).request
    with pytest.raises(GenerationError, match=message):
        Row(replace(request, settings=request.settings.replace(**changes)))


def test_kernels_that_need_rows_of_one_length_are_refused():
    model = SimpleNamespace(config=CONFIG, attn_implementation="flash_attention_2")
    with pytest.raises(GenerationError, match="rows of one length"):
        engine.Engine.__init__(Engine(1), model, 2)
