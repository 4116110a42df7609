"""The command at a terminal: help, narrow bars, questions, completion, real interrupts."""

import io
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer
from rich.console import Console

pytest.importorskip("torch")

from opt_cli import console
from opt_cli.commands import PLACEHOLDERS, Command
from opt_cli.main import app
from opt_cli.training.progress import training_progress
from opt_core.data import write_blocks
from opt_core.training import read_metrics
from tests.support.command_line import COMMAND, PATIENCE, ROOT, Terminal
from tests.support.files.tiny_folder import save_model

SETTINGS = ("--sequence-length", "16", "--batch-size", "2", "--dropout", "0")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=64)


@pytest.fixture
def data(tmp_path):
    write_blocks(tmp_path / "data", [np.random.default_rng(0).integers(3, 60, 400)], 16, 60)
    return tmp_path / "data"


def commands(group: object, path: str = "opt-lm") -> Iterator[tuple[str, object]]:
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_placeholders_are_of_one_kind(opt_lm):
    found = dict(commands(typer.main.get_command(app)))
    assert {"opt-lm train", "opt-lm eval harness", "opt-lm push"} <= found.keys()
    for path, command in found.items():
        assert isinstance(command, Command), path
        for parameter in command.params:
            if not getattr(parameter, "is_flag", False):
                words = set((parameter.metavar or "none").replace("...", "").split())
                assert words <= PLACEHOLDERS, (path, parameter.name, parameter.metavar)
    shown = [opt_lm(*path.split()[1:], "--help").out for path in found] + [opt_lm("--help").out]
    assert not any(re.search(r"<\w+", text) for text in shown)


def test_help_flows(opt_lm, monkeypatch):
    """A paragraph is not broken where the source was."""
    monkeypatch.setenv("COLUMNS", "200")
    assert (
        "a Hugging Face folder with a model card. The same command with"
        in opt_lm("train", "--help").out
    )


@pytest.mark.slow  # a narrow one is that of the training which is interrupted
@pytest.mark.parametrize("columns", [60, 100])
def test_a_terminal_has_its_bar(columns, tiny, data, tmp_path):
    terminal = Terminal(
        "train", tiny, data, "--out", tmp_path / "run", *SETTINGS, "--max-steps", 8,
        columns=columns,
    )  # fmt: skip
    code, shown = terminal.finish()
    assert code == 0, shown
    check_bar(shown, "8/8", columns)


def check_bar(shown, steps, columns):
    """The last line with so many steps has a bar, the loss and, where there is room, the speed."""
    plain = re.sub(r"\x1b\[[\d;?]*\w", "", shown)
    last = [line for line in re.split(r"[\r\n]+", plain) if steps in line][-1]
    assert len(last.rstrip()) <= columns
    assert sum(map(last.count, "━╸╺")) >= 8
    assert re.search(r"loss \d\.\d+", last)
    assert ("tokens/s" in last) == (columns == 100)


@pytest.fixture
def drawn(monkeypatch):
    """Makes stderr a terminal of some width; gives a function for the lines that were drawn."""

    def make(columns):
        file = io.StringIO()
        made = Console(file=file, width=columns, force_terminal=True, _environ={})
        monkeypatch.setattr(console, "stderr", made)
        return lambda: re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*\w", "", file.getvalue()))

    return make


@pytest.mark.parametrize("columns", [30, 40, 60, 100])
def test_a_long_name_leaves_room_for_the_bar(columns, drawn):
    lines = drawn(columns)
    with console.progress("loading facebook/opt-125m-and-its-whole-long-name") as progress:
        progress(1 << 27, 1 << 28)
        time.sleep(0.3)  # it is drawn ten times a second
    found = [line for line in lines() if "134" in line or "50%" in line]
    assert found
    for line in found:
        assert len(line.rstrip()) <= columns
        assert sum(map(line.count, "━╸╺")) >= min(8, columns // 5)
        assert ("/s" in line) == (columns == 100)


@pytest.mark.parametrize("columns", [40, 80])
def test_large_figures_leave_room_for_the_bar(columns, drawn):
    lines = drawn(columns)
    with training_progress(100_000, 0) as on_record:
        on_record({"step": 50_000, "loss": 12.3456, "tokens_per_s": 1_234_567.0})
    found = [line for line in lines() if "50000/100000" in line and "loss 12.34" in line]
    assert found, lines()
    for line in found:
        assert len(line.rstrip()) <= columns
        assert sum(map(line.count, "━╸╺")) >= 8


def test_generate_asks_for_a_prompt(tiny):
    """The words are taken as they are typed; the text has style, and nothing to act on."""
    terminal = Terminal("generate", "-m", tiny, "-n", 3, "--greedy")
    terminal.until("prompt: ")
    # An escape sequence in the prompt stands for a model that writes one.
    terminal.type("Now\x1b[2J[b]is[/b]\n")
    code, shown = terminal.finish()
    assert code == 0, shown
    typed, _, text = shown.partition("\n")
    assert typed.rstrip().endswith("prompt: Now^[[2J[b]is[/b]")
    assert "Now\N{SYMBOL FOR ESCAPE}[2J[b]is[/b]" in text
    assert "\x1b[1m" in text
    assert "3 tokens in" in text


def test_nobody_answers():
    terminal = Terminal("generate")
    terminal.until("prompt: ")
    terminal.type("\x04")
    code, shown = terminal.finish()
    assert code == 2
    assert "no prompt; expected one as an argument or on stdin" in shown


@pytest.mark.parametrize(
    "key", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["key", "signal"]
)
def test_an_interrupted_training_says_how_to_go_on(key, tiny, data, tmp_path, opt_lm):
    """By a real Ctrl-C at a terminal, which is narrow, and by a signal alone."""
    run = tmp_path / "run"
    arguments = ("train", tiny, data, "--out", run, *SETTINGS, "--save-every", 1, "--max-steps")
    if key:
        terminal = Terminal(*arguments, 100_000, columns=40)
        wait_for_steps(run, 3)
        terminal.until("loss ")
        terminal.type("\x03")
        code, told = terminal.finish()
        check_bar(told, "/100000", 40)
        told = " ".join(told.split())  # it is broken at the terminal's end
    else:
        before = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite in the background ignores it
        try:
            process = subprocess.Popen(
                [*COMMAND, *map(str, arguments), "100000"], cwd=ROOT, stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
        finally:
            signal.signal(signal.SIGINT, before)
        wait_for_steps(run, 3)
        process.send_signal(signal.SIGINT)
        told, code = process.communicate(timeout=PATIENCE)[1], process.returncode
        assert "Traceback" not in told
    assert code == 130, told
    found = re.findall(
        r"interrupted; the same command with --resume goes on after step (\d+)", told
    )
    assert len(found) == 1, told
    assert int(found[0]) >= 2
    done = opt_lm(*arguments, int(found[0]) + 2, "--resume")
    assert done.code == 0, done.err
    assert [r["step"] for r in read_metrics(run)] == [*range(1, int(found[0]) + 3)]


def wait_for_steps(run: Path, count: int) -> None:
    stop = time.monotonic() + PATIENCE
    while len(read_metrics(run)) < count:
        assert time.monotonic() < stop
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("opt-lm ge", "generate"),
        ("opt-lm eval har", "harness"),
        ("opt-lm train --resu", "--resume"),
    ],
)
def test_the_shell_completes(words, expected):
    environment = {
        "_OPT_LM_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(
        COMMAND, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [expected], done.stderr
