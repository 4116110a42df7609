"""`describe` and the command line, for every format and a hub that is asked for headers only."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import conversion
from conversion.targets import TARGETS
from opt_cli.main import main
from opt_core.params import count_parameters
from tests.conversion.checkpoints import assert_values, make
from tests.core.checkpoint_fixtures import (
    EMBEDDING,
    TINY,
    UNTIED,
    write,
)
from tests.small_tokenizer import write_opt_folder

ROOT = Path(__file__).parents[2]
COMMIT = "c" * 40


@pytest.mark.parametrize("to", TARGETS)
def test_every_format_is_described(to: str, tmp_path: Path):
    make(tmp_path / "a", dtype="float16")
    done = conversion.convert(tmp_path / "a", tmp_path / "b", to)
    for path in (tmp_path / "b", tmp_path / "b" / TARGETS[to].file):
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


class Hub(BaseHTTPRequestHandler):
    """A repository on this machine, which counts the bytes it sends."""

    protocol_version = "HTTP/1.1"
    folders: dict[str, Path] = {}  # noqa: RUF012
    sent = 0
    ranges = True

    def log_message(self, format: str, *args: object) -> None:
        """Quietly."""

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            Hub.sent += len(body)
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
        folder = self.folders.get("/".join(parts[:2]))
        if folder is None:
            return self.reply(404, X_Error_Code="RepoNotFound")
        if parts[2:3] != ["resolve"]:
            siblings = [
                {"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size}
                for path in folder.rglob("*")
                if path.is_file()
            ]
            if parts[2:3] == ["tree"]:
                tree = [
                    {"type": "file", "path": s["rfilename"], "size": s["size"], "oid": "x"}
                    for s in siblings
                ]
                return self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
            info = {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": siblings, "tags": []}
            return self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
        data = folder.joinpath(*parts[4:]).read_bytes()
        asked = self.headers.get("Range")
        if asked and self.ranges:
            start, stop = asked.removeprefix("bytes=").split("-")
            data = data[int(start) : int(stop) + 1]
            return self.reply(206, data, ETag='"x"')
        return self.reply(200, data, ETag=f'"{parts[-1]}"')

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.folders, Hub.sent, Hub.ranges = {}, 0, True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


INFO = """
import sys
from opt_cli.main import main
for name in sys.argv[1:]:
    try:
        main(["info", name, "--json"])
    except SystemExit as end:
        print(end.code, flush=True)
"""


def info(url: str, home: Path, *names: str) -> tuple[list[tuple[int, dict[str, Any]]], str]:
    """Exit code and answer for each name, and what was said on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", INFO, *names],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    answers: list[tuple[int, dict[str, Any]]] = []
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found = json.loads(line)
        else:
            answers.append((int(line), found))
            found = {}
    return answers, done.stderr


SPREAD = {
    "safetensors": "1MB",
    "torch-bin": "5GB",
    "tf-h5": "5GB",
    "flax-msgpack": "1MB",
    "keras-hub": "5GB",
}


def test_of_a_hub_id_only_headers_are_read(hub: str, tmp_path: Path):
    config = TINY.replace(vocab_size=40_000, hidden_size=16, ffn_dim=20)
    make(tmp_path / "original", config)
    write_opt_folder(tmp_path / "original")
    for to, shard in SPREAD.items():
        conversion.convert(tmp_path / "original", tmp_path / to, to, max_shard_size=shard)
        Hub.folders[f"org/{to}"] = tmp_path / to
    answers, err = info(hub, tmp_path / "home", *Hub.folders)
    size = 0
    for to, (code, found) in zip(SPREAD, answers, strict=True):
        assert code == 0, (found, err)
        local = conversion.describe(tmp_path / to)
        assert found["path"] == f"org/{to}"
        assert found["format"] == to
        assert found["parameters"] == local.parameters == count_parameters(config)
        assert found["files"] == local.files
        assert found["tensors"] == [
            {**dataclasses.asdict(tensor), "shape": list(tensor.shape)} for tensor in local.tensors
        ]
        assert found["vocabulary"] == local.vocabulary
        size += sum(local.files.values())
    assert len(local.files) == 1
    assert Hub.sent < 1_500_000 < size / 5


def test_a_stale_file_on_the_hub_is_told(hub: str, tmp_path: Path):
    make(tmp_path / "a")
    conversion.convert(tmp_path / "a", tmp_path / "b", "flax-msgpack", max_shard_size="1KB")
    (tmp_path / "b" / "flax_model.msgpack").write_bytes(b"from before the index")
    Hub.folders["org/model"] = tmp_path / "b"
    ((code, found),), _ = info(hub, tmp_path / "home", "org/model")
    assert code == 1
    assert found["problems"][0].startswith("org/model/flax_model.msgpack: not read: flax_model.m")


def test_what_is_wrong_on_the_hub_is_told_and_nothing_is_downloaded(hub: str, tmp_path: Path):
    weights = make(tmp_path / "source", TINY.replace(vocab_size=40_000))
    config = TINY.replace(vocab_size=40_000, num_hidden_layers=3)
    config.save_pretrained(tmp_path / "source")
    Hub.folders["org/model"] = tmp_path / "source"
    ((code, found),), _ = info(hub, tmp_path / "home", "org/model")
    assert code == 1
    (problem,) = found["problems"]
    assert problem.startswith("org/model: weights and configuration do not fit: 16 missing")
    Hub.ranges = False
    ((code, _),), err = info(hub, tmp_path / "home", "org/model")
    assert code == 2
    assert "does not give parts of it" in err
    assert Hub.sent < weights[EMBEDDING].nbytes + 1_000_000
    (tmp_path / "source" / "model.safetensors").write_bytes(b"\xff" * 100)
    Hub.ranges = True
    ((code, found), (absent, _)), err = info(hub, tmp_path / "home", "org/model", "org/absent")
    assert code == 1
    assert "org/model/model.safetensors: not a sound safetensors file" in found["problems"][0]
    assert absent == 2
    assert "no such repository" in err
