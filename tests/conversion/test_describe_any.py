"""`describe` and the command line, for every format."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import conversion
from conversion.writers import WRITERS
from opt_cli.main import main
from opt_core.params import count_parameters
from tests.support.files.checkpoint_fixtures import (
    EMBEDDING,
    TINY,
    UNTIED,
    write,
)
from tests.support.files.format_fixtures import assert_values, make

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("to", WRITERS)
def test_every_format_is_described(to: str, tmp_path: Path):
    make(tmp_path / "a", dtype="float16")
    done = conversion.convert(tmp_path / "a", tmp_path / "b", to)
    for path in (tmp_path / "b", tmp_path / "b" / WRITERS[to].file):
        found = conversion.describe(path)
        assert not found.problems
        assert (found.format, found.head, found.files) == (to, "causal_lm", done.files)
        assert found.parameters == count_parameters(TINY) == done.parameters
        assert found.dtypes == {"float16": 36}
        assert found.config is not None
        assert found.config.hidden_size == TINY.hidden_size


@pytest.mark.parametrize("to", ["tf-h5", "flax-msgpack", "metaseq", "keras-hub"])
def test_what_is_wrong_is_told_in_every_format(to: str, tmp_path: Path):
    make(tmp_path / "a", TINY.replace(_remove_final_layer_norm=True, do_layer_norm_before=True))
    if to == "keras-hub":  # which cannot hold it
        make(tmp_path / "a", TINY.replace(num_hidden_layers=1))
    conversion.convert(tmp_path / "a", tmp_path / "b", to)
    if to != "keras-hub":
        TINY.save_pretrained(tmp_path / "b")
        (problem,) = conversion.describe(tmp_path / "b").problems
        assert "June 2022" in problem
        return
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["config"]["num_layers"] = 2
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    (problem,) = conversion.describe(tmp_path / "b").problems
    assert "set num_hidden_layers to 1" in problem


def test_metaseq_without_a_configuration_is_described(tmp_path: Path):
    make(tmp_path / "a")
    conversion.convert(tmp_path / "a", tmp_path / "b", "metaseq")
    (tmp_path / "b" / "config.json").unlink()
    found = conversion.describe(tmp_path / "b")
    assert not found.problems
    assert found.config is not None
    assert found.config.num_attention_heads == TINY.num_attention_heads


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_the_command_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    weights = make(tmp_path / "a")
    new = tmp_path / "b"
    code, out, err = run(capsys, "convert", tmp_path / "a", new, "--to", "tf-h5", "--dtype=float16")
    size = (new / "tf_model.h5").stat().st_size
    expected = f"{new}: tf-h5 from safetensors, 1 file, {size / 1024:.4g} KiB\n"
    assert (code, out, err) == (0, expected, "")
    assert_values(new, {name: array.astype(np.float16) for name, array in weights.items()})
    code, out, err = run(capsys, "convert", tmp_path / "a", new)
    assert (code, out) == (2, "")
    assert err == f"error: {new}: already exists; name a new folder\n"
    code, out, err = run(capsys, "convert", new, tmp_path / "c", "--max-shard-size=1KB", "--json")
    report = json.loads(out)
    assert (code, report["source_format"], report["format"]) == (0, "tf-h5", "safetensors")
    assert report["path"] == str(tmp_path / "c")
    assert len(report["files"]) > 2
    code, _, err = run(capsys, "convert", tmp_path / "a", tmp_path / "d", "--to=onnx")
    assert code == 2
    assert "expected one of safetensors, torch-bin" in err


def test_the_command_tells_what_to_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    weights = make(tmp_path / "a", UNTIED)
    weights[EMBEDDING][0, 0] = np.nan
    write(tmp_path / "a", weights)
    code, _, err = run(capsys, "convert", tmp_path / "a", tmp_path / "b", "--to=tf-h5")
    assert code == 0
    first, second = err.splitlines()
    assert "ties every head" in first
    assert second == f"note: {EMBEDDING}: 1 values are NaN or infinite"
    code, out, _ = run(capsys, "info", tmp_path / "b", "--json")
    assert code == 0
    assert json.loads(out)["format"] == "tf-h5"


def test_a_bar_shows_bytes_per_second(tmp_path: Path):
    """On a terminal, played by a pseudo-terminal."""
    import pty

    make(tmp_path / "a", TINY.replace(hidden_size=64, vocab_size=4000))
    command = [sys.executable, "-m", "opt_cli", "convert", str(tmp_path / "a"), str(tmp_path / "b")]
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=follower, stdout=subprocess.DEVNULL, env=environment
    )
    os.close(follower)
    shown = b""
    try:
        while data := os.read(leader, 1 << 16):
            shown += data
    except OSError:  # the other end was closed
        pass
    os.close(leader)
    assert process.wait() == 0
    assert b"converting" in shown
    assert b"B/s" in shown


def test_names_from_a_file_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    weights = make(tmp_path / "a")
    write(tmp_path / "a", {**weights, "\x1b[2J": weights[EMBEDDING]})
    code, _, err = run(capsys, "convert", tmp_path / "a", tmp_path / "b")
    assert code == 2
    assert "\x1b" not in err
    assert len(err.splitlines()) == 1
