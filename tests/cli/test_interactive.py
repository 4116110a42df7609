"""One text by turns: the cache is kept, turns can be taken back, lines are edited."""

import importlib

import numpy as np
import pytest

from opt_cli.backends import load_backend
from opt_cli.interactive import HELP, Conversation, command
from opt_core import GenerationConfig, OPTTokenizer
from opt_core.errors import GenerationError
from opt_core.hub import resolve
from tests.support.command_line import Terminal

READS_KEYS = "\x1b[?2004h"
"""Told to a terminal when a line can be typed."""
SETTINGS = GenerationConfig(
    do_sample=True, top_k=20, max_new_tokens=12, eos_token_id=2, pad_token_id=1
)


@pytest.fixture(scope="module")
def loaded():
    pytest.importorskip("torch")
    path = resolve("mini")
    return load_backend("torch").from_pretrained(path), OPTTokenizer.from_pretrained(path)


@pytest.fixture
def conversation(loaded, monkeypatch):
    """A conversation, and how many tokens each turn read."""
    made = Conversation(loaded[0], loaded[1], "torch", SETTINGS, seed=3)
    engine, lengths = importlib.import_module("opt_torch.serving.engine").Engine, []
    read = engine.read

    def watched(self, table, slot, start, end, *rest):
        lengths.append(end - start)
        return read(self, table, slot, start, end, *rest)

    monkeypatch.setattr(engine, "read", watched)
    return made, lengths


def test_turns_read_what_is_new(conversation, loaded):
    talk, lengths = conversation
    model, tokenizer = loaded
    text, expected = "", tokenizer.encode("ROMEO:")
    for line in ("ROMEO:", "JULIET:", ""):
        before = len(talk.ids)
        written = "".join(talk.turn(line))
        if line == "JULIET:":
            expected += tokenizer.encode("\nJULIET:", add_special_tokens=False)
        ids = model.generate([expected], [[1] * len(expected)], SETTINGS, 3)
        new = np.asarray(ids)[0, len(expected) :].tolist()
        assert written == tokenizer.decode(new, skip_special_tokens=True)
        # The newest token of the last turn was never read, nor is what comes after this one's end.
        assert lengths.pop() == len(expected) - max(before - 1, 0)
        expected += [i for i in new if i != 2]
        assert talk.ids == expected
        text += written
    assert not lengths


def test_turns_are_taken_back(conversation):
    talk, lengths = conversation
    first = "".join(talk.turn("ROMEO:"))
    before = list(talk.ids)
    second = "".join(talk.turn("JULIET:"))
    assert command(talk, "/undo") == "taken back"
    assert talk.ids == before
    assert "".join(talk.turn("JULIET:")) == second
    assert lengths[-1] == 1, "what was read is still there"
    command(talk, "/undo")
    assert command(talk, "/seed 4") == "seed 4"
    assert "".join(talk.turn("JULIET:")) != second
    assert command(talk, "/new") == "a new text"
    assert command(talk, "/undo") == "there is no turn to take back"
    command(talk, "/seed 3")
    assert "".join(talk.turn("ROMEO:")) == first
    assert command(talk, "/help") == HELP
    assert command(talk, "/sed").startswith("no such command: /sed")
    assert command(talk, "/seed x").startswith("/seed: expected an integer")


def test_a_full_window_is_told(conversation):
    talk, _ = conversation
    "".join(talk.turn("a" * 200))
    with pytest.raises(GenerationError, match="fills the model's 256 tokens"):
        "".join(talk.turn("b " * 200))
    assert command(talk, "/undo") == "taken back", "the turn that failed is none"
    assert not talk.ids


def test_an_ended_turn_leaves_its_words(conversation):
    talk, _ = conversation
    turn = talk.turn("ROMEO:")
    words = [next(turn), next(turn)]
    turn.close()
    assert talk.scheduler.is_idle
    assert "".join(words) == talk.tokenizer.decode(talk.ids[-2:])


def test_at_a_terminal(opt_lm, monkeypatch):
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")
    terminal = Terminal("generate", "-i", "-n", 5, "--greedy")
    terminal.until(READS_KEYS)
    terminal.type("ROMEO:\r")
    terminal.until("O, that")
    terminal.until("love")
    terminal.type("/undo\r")
    terminal.until("taken back")
    terminal.type("/quit\r")
    code, shown = terminal.finish()
    assert code == 0, shown
    code, _, err = opt_lm("generate", "--interactive")
    assert (code, err) == (
        2,
        "error: --interactive needs a terminal; for one text, pass it as an argument\n",
    )
    assert opt_lm("generate", "-i", "ROMEO:").code == 2
