"""The `opt-lm` command as users and scripts meet it: text, exit codes, errors of one line."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import opt_torch
import opt_torch.checkpoint
from opt_cli.generate import DEFAULT_NEW_TOKENS, _without_padding, resolve_settings
from opt_cli.main import main
from opt_core import GenerationConfig, OPTTokenizer, __version__
from opt_core.errors import GenerationError
from tests.support.command_line import Run
from tests.support.files.tiny_folder import save_model

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "opt_cli"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096)


def expected_text(tiny: Path, prompt: str, **settings: Any) -> str:
    """The library's own text for a prompt."""
    model = opt_torch.OPTForCausalLM.from_pretrained(tiny)
    tokenizer = OPTTokenizer.from_pretrained(tiny)
    ids = tokenizer([prompt], return_tensors="np").input_ids
    rows = model.generate(ids, tokenizer=tokenizer, **settings)
    return prompt + tokenizer.decode(np.asarray(rows)[0, ids.shape[1] :], skip_special_tokens=True)


def test_version_and_help(opt_lm: Run):
    assert opt_lm("--version") == (0, f"opt-lm {__version__}\n", "")
    for arguments in ([], ["--help"], ["-h"]):
        code, out, err = opt_lm(*arguments)
        assert (code, err) == (0, "")
        assert all(command in out for command in ("generate", "info", "verify"))


def test_help_names_every_setting(opt_lm: Run):
    out = opt_lm("generate", "--help").out
    for name in (
        *("model", "backend", "dtype", "max-new-tokens", "stop", "seed", "stream", "no-stream"),
        *("do-sample", "greedy", "temperature", "top-k", "top-p", "min-p", "typical-p", "json"),
        *("repetition-penalty", "no-repeat-ngram-size", "num-beams", "length-penalty"),
        *("num-return-sequences", "prompt-lookup", "assistant"),
    ):
        assert re.search(rf"--{name}\b", out), name


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_generate_prints_prompt_and_text(stream: str, opt_lm: Run, tiny: Path):
    expected = expected_text(tiny, "Now is", max_new_tokens=20)
    code, out, err = opt_lm("generate", "Now is", "-m", tiny, "-n", 20, stream)
    assert (code, out) == (0, expected + "\n")
    assert re.search(r"loaded in [\d.]+ s, \d+ tokens in [\d.]+ s, [\d.]+ tokens/s\n$", err)


def test_a_model_larger_than_memory_is_read_layer_by_layer(
    opt_lm: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = expected_text(tiny, "Now is", max_new_tokens=5) + "\n"
    given = ["generate", "Now is", "-m", tiny, "-n", 5]
    assert opt_lm(*given, "--offload").out == expected
    monkeypatch.setattr(opt_torch.checkpoint, "available_memory", lambda: 0.0)
    for options, is_told in (([], True), (["--no-offload"], False)):
        code, out, err = opt_lm(*given, *options)
        assert (code, out) == (0, expected)
        told = [line for line in err.splitlines() if "do not fit into 0.0 GiB" in line]
        assert len(told) == is_told
        assert len(err.splitlines()) == 1 + is_told
    text = tiny.parent / "text.txt"
    text.write_text("Now is the winter of our discontent. " * 20)
    measured = opt_lm("eval", "perplexity", text, "-m", tiny, "--window", 16)
    assert measured.code == 0
    assert "do not fit into 0.0 GiB" in measured.err
    monkeypatch.undo()
    again = opt_lm("eval", "perplexity", text, "-m", tiny, "--window", 16)
    assert (again.out, "do not fit" in again.err) == (measured.out, False)
    code, _, err = opt_lm(*given, "--offload", "--quantize", "int8")
    assert (code, err) == (2, "error: offload: expected quantize=None, received 'int8'\n")


def test_a_stream_that_ends_inside_a_character_is_flushed(opt_lm: Run, tiny: Path):
    for length in range(1, 9):
        expected = expected_text(tiny, "Now is", max_new_tokens=length)
        assert opt_lm("generate", "Now is", "-m", tiny, "-n", length).out == expected + "\n"


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([5, 2, 1, 1], [5, 2]),
        ([5, 6, 1, 1], [5, 6]),
        ([5, 1, 6], [5, 1, 6]),
        ([2, 2], [2]),
        ([], []),
    ],
)
def test_padding_after_the_end_is_no_text(ids: list[int], kept: list[int]):
    settings = GenerationConfig(eos_token_id=(2, 9), pad_token_id=1)
    assert _without_padding(ids, settings) == kept


def test_generate_passes_its_options_on(opt_lm: Run, tiny: Path):
    settings = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95}
    settings |= {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    settings |= {"do_sample": True, "max_new_tokens": 24}
    expected = expected_text(tiny, "York", seed=5, **settings)
    options += ["--do-sample", "--seed=5", "-n", "24"]
    assert opt_lm("generate", "York", "-m", tiny, *options).out == expected + "\n"
    other = opt_lm("generate", "York", "-m", tiny, *options, "--seed=6").out
    assert other != expected + "\n"


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_drafting_changes_no_text(stream: str, opt_lm: Run, tiny: Path):
    expected = expected_text(tiny, "Now is", max_new_tokens=20)
    for option in ("--prompt-lookup=3", f"--assistant={tiny}"):
        out = opt_lm("generate", "Now is", "-m", tiny, "-n", 20, stream, option).out
        assert out == expected + "\n"
    options = (f"--assistant={tiny}", "--prompt-lookup=3")
    code, _, err = opt_lm("generate", "Now is", "-m", tiny, *options)
    assert (code, "both draft; choose one" in err) == (2, True)


def test_generate_json_tells_all(opt_lm: Run, tiny: Path):
    arguments = ["-m", tiny, "-n", 6, "--num-beams", 3, "--num-return-sequences", 2, "--json"]
    code, out, _ = opt_lm("generate", "Now", "the [b]sun[/b]", *arguments)
    assert code == 0
    assert out.count("\n") == 1
    report = json.loads(out)
    assert report["settings"]["num_beams"] == 3
    assert report["tokens_per_s"] > 0
    completions = report["completions"]
    assert [c["prompt"] for c in completions] == ["Now"] * 2 + ["the [b]sun[/b]"] * 2
    assert report["tokens"] == sum(len(c["ids"]) for c in completions)
    tokenizer = OPTTokenizer.from_pretrained(tiny)
    assert all(c["text"] == tokenizer.decode(c["ids"], True) for c in completions)


def test_several_prompts_give_what_each_gives_alone(opt_lm: Run, tiny: Path):
    prompts = ["Now", "the winter of our discontent"]
    out = opt_lm("generate", *prompts, "-m", tiny, "-n", 12, "--json").out
    together = [c["text"] for c in json.loads(out)["completions"]]
    alone = [expected_text(tiny, p, max_new_tokens=12).removeprefix(p) for p in prompts]
    assert together == alone


def test_several_texts_are_numbered(opt_lm: Run, tiny: Path):
    out = opt_lm("generate", "Now", "the [b]sun[/b]", "-m", tiny, "-n", 1).out
    assert out.startswith("[1/2] Now")
    assert "\n[2/2] the [b]sun[/b]" in out


def test_stop_ends_the_text(opt_lm: Run, tiny: Path):
    text = expected_text(tiny, "Now is", max_new_tokens=30).removeprefix("Now is")
    stop = next(c for c in text if c.isascii() and c.isprintable())
    out = opt_lm("generate", "Now is", "-m", tiny, "-n", 30, "--stop", stop, "--stop", "zzz").out
    assert text.startswith(out.removeprefix("Now is").rstrip("\n"))
    assert stop in out
    assert len(out) < len("Now is" + text)


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_generate_reads_stdin(arguments: list[str], opt_lm: Run, tiny: Path):
    out = opt_lm("generate", *arguments, "-m", tiny, "-n", 3, "--json", stdin=b"two\nlines\n").out
    assert json.loads(out)["completions"][0]["prompt"] == "two\nlines"


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        ([], b"", "stdin: expected a prompt"),
        (["-"], b"\xff", "stdin: expected UTF-8"),
        (["x", "--top-k", "5"], b"", "--top-k has no effect without --do-sample"),
        (["x", "--length-penalty", "2"], b"", "--length-penalty has no effect without --num-beams"),
        (["x", "y", "--stream"], b"", "--stream needs one prompt"),
        (["x", "--stream", "--num-beams", "2"], b"", "--stream needs one prompt"),
        (["x", "--top-p", "2", "--do-sample"], b"", "top_p: expected"),
        (["x", "-n", "5000"], b"", "max_position_embeddings=4096"),
        (["x", "-n", "many"], b"", "--max-new-tokens"),
        (["x", "--no-such-option"], b"", "--no-such-option"),
        (["x", "--backend", "jax"], b"", "expected one of torch, tf, flax"),
        (["x", "--backend", "tf", "--device", "cuda"], b"", "--device is for the torch backend"),
        (["x", "--dtype", "int3"], b"", "dtype: expected one of"),
        (["x", "--revision", "v2"], b"", "revision='v2' is for hub ids"),
        (["x", "--stop", ""], b"", "stop_strings"),
    ],
)
def test_generate_refuses_in_one_line(
    arguments: list[str], stdin: bytes, message: str, opt_lm: Run, tiny: Path
):
    code, out, err = opt_lm("generate", "-m", tiny, *arguments, stdin=stdin)
    assert (code, out) == (2, "")
    assert message in err
    assert re.fullmatch(r"error: .+\n", err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "-m", "./nowhere"], "./nowhere: no such folder"),
        (["info", "nowhere"], "no such folder"),
        (["verify", "./nowhere", "mini"], "./nowhere: no such folder"),
        (["info"], "Missing argument"),
        (["translate"], "No such command 'translate'"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_users_errors_are_one_line_and_exit_2(arguments: list[str], message: str, opt_lm: Run):
    code, out, err = opt_lm(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert re.fullmatch(r"error: .+\n", err)


def test_an_error_is_not_read_as_markup(opt_lm: Run):
    assert "./[bold]x[/bold]" in opt_lm("info", "./[bold]x[/bold]").err


def test_a_file_that_may_not_be_read_is_an_error_of_one_line(
    opt_lm: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "secret.bin")

    monkeypatch.setattr("conversion.describe", refuse)
    code, _, err = opt_lm("info", tiny)
    assert (code, err) == (2, "error: [Errno 13] Permission denied: 'secret.bin'\n")


def test_info_shows_the_model(opt_lm: Run, tiny: Path):
    code, out, err = opt_lm("info", tiny)
    assert (code, err) == (0, "")
    for expected in ("safetensors, 1 file", "float32 (36 tensors)", "320 token ids", "pre-LN"):
        assert expected in out
    assert "model.decoder.layers.0.fc1.weight" not in out
    assert "model.decoder.layers.0.fc1.weight" in opt_lm("info", tiny, "--tensors").out


def test_info_json_is_whole(opt_lm: Run, tiny: Path):
    report = json.loads(opt_lm("info", tiny, "--json").out)
    assert report["config"]["hidden_size"] == 32
    assert len(report["tensors"]) == 36
    assert report["parameters"] == sum(part["parameters"] for part in report["parts"])


def test_info_of_a_broken_model_exits_1(opt_lm: Run, tiny: Path, tmp_path: Path):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:9000])
    code, out, _ = opt_lm("info", tmp_path)
    assert code == 1
    assert "problem: " in out


def test_verify_says_equal_or_different(opt_lm: Run, tiny: Path, tmp_path: Path):
    code, out, _ = opt_lm("verify", tiny, tiny, "-n", 4)
    assert code == 0
    assert "\nequal: largest difference 0.00e+00" in out
    other = save_model(tmp_path, seed=1)
    code, out, _ = opt_lm("verify", tiny, other, "-n", 4, "--prompt", "Now [b]is[/b]")
    assert code == 1
    assert "\ndifferent: " in out
    assert "[b]is[/b]" in out
    code, out, _ = opt_lm("verify", tiny, other, "-n", 4, "--json")
    report = json.loads(out)
    assert (code, report["equal"]) == (1, False)
    assert len(report["differences"]) == 3


@pytest.mark.parametrize(
    ("base", "given", "expected"),
    [
        ({}, {}, {"max_new_tokens": DEFAULT_NEW_TOKENS}),
        ({"max_length": 99}, {}, {"max_new_tokens": None, "max_length": 99}),
        ({"max_new_tokens": 7}, {}, {"max_new_tokens": 7}),
        ({"max_new_tokens": 7}, {"max_new_tokens": 3}, {"max_new_tokens": 3}),
        ({"do_sample": True}, {"top_p": 0.5}, {"do_sample": True, "top_p": 0.5}),
        ({"do_sample": True}, {"num_beams": 4}, {"do_sample": False, "num_beams": 4}),
        ({"num_beams": 4}, {"do_sample": True}, {"do_sample": True, "num_beams": 1}),
    ],
)
def test_options_go_over_the_models_own(base: Any, given: Any, expected: Any):
    settings = resolve_settings(GenerationConfig(**base), given)
    assert {name: getattr(settings, name) for name in expected} == expected


def test_options_that_contradict_one_another_are_refused():
    with pytest.raises(GenerationError, match="num_beam_groups=2 does not divide"):
        resolve_settings(GenerationConfig(num_beam_groups=2), {"num_beams": 3})
    with pytest.raises(GenerationError, match="--temperature has no effect"):
        resolve_settings(GenerationConfig(do_sample=True), {"do_sample": False, "temperature": 1.0})


def test_the_embedded_model_writes(opt_lm: Run):
    code, out, _ = opt_lm("generate", "ROMEO:", "-n", 40)
    assert code == 0
    assert out.startswith("ROMEO:")
    assert len(out.split()) > 5
    assert opt_lm("info", "mini").code == 0
    assert opt_lm("verify", "mini", "mini", "-n", 2).code == 0


class Beginning(io.StringIO):
    """An output in which something happens once it has the first words of a text."""

    def __init__(self, happen: Callable[[], None]):
        super().__init__()
        self.happen = happen

    def write(self, text: str) -> int:
        written = super().write(text)
        if self.getvalue().startswith("Now is") and len(self.getvalue()) > len("Now is"):
            self.happen()
        return written


LONG = ("generate", "Now is", "-n", "4000", "--do-sample", "-m")


def test_an_interrupt_ends_a_text_quietly(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    out = Beginning(lambda: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(sys, "stdout", out)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as end:
            main([*LONG, str(tiny)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130
    assert out.getvalue().endswith("\n")
    assert capsys.readouterr().err == ""


def test_a_broken_pipe_ends_a_text_quietly(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        going = threading.Thread(target=lambda: (os.read(reader, 3), os.close(reader)))
        going.start()
        with pytest.raises(SystemExit) as end:
            main([*LONG, str(tiny)])
        going.join()
        assert end.value.code == 141
    # Closing it wrote to nobody, as the interpreter does at its end.
    assert capsys.readouterr().err == ""


def start_long_generation(tiny: Path) -> subprocess.Popen[bytes]:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite in the background ignores it; heirs too
    try:
        command = [*COMMAND, *LONG, str(tiny)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow  # the same in this process is above
def test_a_process_ends_quietly_at_a_broken_pipe(tiny: Path):
    process = start_long_generation(tiny)
    assert process.stdout
    assert process.stderr
    assert process.stdout.read(3) == b"Now"
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""


@pytest.mark.slow  # the same in this process is above, a real Ctrl-C in test_terminal.py
def test_a_process_ends_quietly_when_it_is_interrupted(tiny: Path):
    process = start_long_generation(tiny)
    assert process.stdout
    assert process.stdout.read(3) == b"Now"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert err == b""


def test_bench_measures(opt_lm: Run, tiny: Path):
    tasks = ("prefill", "lookup", "train")
    given = [part for task in tasks for part in ("--task", task)]
    code, out, err = opt_lm("bench", tiny, *given, "--reps", 1, "-n", 4, "--json")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["task"] for row in rows] == list(tasks)
    assert all(0 < row["tok_s"] <= row["best"] for row in rows)
    code, out, err = opt_lm("bench", "mini", "--task", "decode", "--reps", 1, "-n", 4)
    assert (code, err) == (0, "")
    assert re.search(r"^decode +\d", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "speed"), "--task: expected one of prefill, decode, batch"),
        (("--quantize", "int2"), 'quantize: expected "int8", "int4" or None, received \'int2\''),
        (("-n", 256), "new tokens: expected less than 256, received 256"),
    ],
)
def test_bench_refuses(opt_lm: Run, options: tuple[Any, ...], message: str):
    code, out, err = opt_lm("bench", "mini", "--task", "decode", *options)
    assert (code, out) == (2, "")
    assert message in err
