"""Finding models: on disk, inside the package, and on a hub played by a server on this machine."""

import hashlib
import json
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from opt_core.errors import CheckpointError
from opt_core.hub import TOKENIZER_FILES, model_files, resolve
from tests.support.files.hub_here import lead

ROOT = Path(__file__).parents[2]
COMMITS = {"main": "a" * 40, "old": "b" * 40}
TOKENIZER = ["vocab.json", "merges.txt", "tokenizer_config.json"]
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
REPOSITORIES = {
    "org/full": [
        *("config.json", "generation_config.json", *TOKENIZER, "README.md", "x.safetensors"),
        *("model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"),
        "onnx/model.onnx",
    ],
    "org/sharded": ["config.json", "model.safetensors.index.json", *SHARDS, "model.safetensors"],
    "org/torch": ["config.json", *TOKENIZER, "pytorch_model.bin", "flax_model.msgpack"],
    "org/h5": ["config.json", "tf_model.h5"],
    "org/gated": ["config.json", "model.safetensors"],
    "org/denied": ["config.json", "model.safetensors"],
}


@dataclass
class Hub:
    """Speaks the endpoints that huggingface_hub asks, and remembers what was asked."""

    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    url: str = ""
    down: bool = False

    def downloads(self) -> set[str]:
        return {
            path.split("/", 5)[5]
            for path in self.requests
            if path.startswith("GET ") and "/resolve/" in path
        }


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Quietly."""

        def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def answer(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            hub.tokens.add(self.headers.get("Authorization"))
            path = self.path.partition("?")[0]
            parts = path.removeprefix("/api/models").strip("/").split("/")
            name = "/".join(parts[:2])
            if hub.down:
                return self.reply(503)
            if name == "org/private" and self.headers.get("Authorization") != "Bearer good":
                return self.reply(401, X_Error_Code="RepoNotFound")
            files = REPOSITORIES.get(
                name, REPOSITORIES["org/full"] if name == "org/private" else None
            )
            if files is None:
                return self.reply(404, X_Error_Code="RepoNotFound")
            kind, revision = (parts[2], parts[3]) if len(parts) > 3 else ("revision", "main")
            commit = COMMITS.get(revision, revision)
            if commit not in COMMITS.values():
                return self.reply(404, X_Error_Code="RevisionNotFound")
            if kind == "revision":
                siblings = [{"rfilename": file} for file in files]
                info = {
                    "id": name,
                    "sha": commit,
                    "siblings": siblings,
                    "tags": [],
                    "private": False,
                }
                return self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
            if kind == "tree":
                tree = [
                    {
                        "type": "file",
                        "path": file,
                        "size": len(content(file, commit)),
                        "oid": etag(file, commit),
                    }
                    for file in files
                ]
                return self.reply(200, json.dumps(tree).encode(), Content_Type="application/json")
            assert kind == "resolve", self.path
            if name == "org/gated":
                return self.reply(403, X_Error_Code="GatedRepo")
            if name == "org/denied":
                return self.reply(403)
            file = "/".join(parts[4:])
            return self.reply(
                200, content(file, commit), X_Repo_Commit=commit, ETag=f'"{etag(file, commit)}"'
            )

        do_GET = do_HEAD = answer

    return Handler


def content(file: str, commit: str) -> bytes:
    return f"{file} of {commit[0]}".encode()


def etag(file: str, commit: str) -> str:
    return hashlib.sha1(content(file, commit)).hexdigest()


@pytest.fixture
def hub():
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def ask(hub, tmp_path):
    """Calls `resolve`; gives the files of the folder, or what the error says."""

    def call(name: str, environment: dict[str, str] | None = None, **options: Any):
        given = environment or {}
        url = given.get("HF_ENDPOINT") or str(hub.url)
        with pytest.MonkeyPatch.context() as patch:
            offline = given.get("HF_HUB_OFFLINE") == "1"
            lead(patch, url, tmp_path / "hf", offline)
            try:
                folder = resolve(name, **options)
            except CheckpointError as error:
                folder, told = None, str(error)
        if folder is None:
            assert "\n" not in told
            return told
        assert folder.is_relative_to(tmp_path / "hf")
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_text() for path in files}

    return call


WANTED = {"config.json", "generation_config.json", *TOKENIZER, "model.safetensors"}


def test_download_then_offline(hub, ask):
    files = ask("org/full")
    assert set(files) == hub.downloads() == WANTED
    assert files["config.json"] == "config.json of a"
    hub.requests.clear()
    assert ask("org/full", local_files_only=True) == files
    assert ask("org/full", {"HF_HUB_OFFLINE": "1"}) == files
    assert hub.requests == []
    assert ask("org/full") == files  # asks whether it changed, and downloads nothing again
    assert hub.downloads() == set()
    hub.down = True
    assert ask("org/full") == files


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/sharded", {"config.json", "model.safetensors.index.json", *SHARDS}),
        ("org/torch", {"config.json", *TOKENIZER, "pytorch_model.bin"}),
    ],
)
def test_one_weight_format(hub, ask, name, expected):
    assert set(ask(name)) == hub.downloads() == expected


def test_named_files_only(hub, ask):
    assert set(ask("org/full", files=["config.json"])) == {"config.json"}
    assert "no tokenizer.json" in ask("org/full", files=["tokenizer.json"])
    both = ask("org/full", files=["config.json"], optional=["merges.txt", "tokenizer.json"])
    assert set(both) == hub.downloads() == {"config.json", "merges.txt"}
    hub.requests.clear()
    assert ask("org/full", files=["config.json"], local_files_only=True)
    error = ask("org/full", local_files_only=True)  # the weights have never been fetched
    assert "in the local cache: no model.safetensors" in error
    assert "network access" in error
    assert hub.requests == []


def test_revision(ask):
    assert ask("org/full", revision="old")["config.json"] == "config.json of b"
    assert "(revision 'none'): the repository has no such revision" in ask(
        "org/full", revision="none"
    )
    assert "not in the local cache" in ask("org/full", local_files_only=True)
    assert ask("org/full", revision="old", local_files_only=True)


def test_token_is_sent(hub, ask):
    assert "if it is private, pass token=" in ask("org/private")
    assert hub.tokens == {None}
    assert set(ask("org/private", token="good")) == WANTED
    assert hub.tokens == {None, "Bearer good"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/absent", "no such folder, and no such repository on http://127.0.0.1"),
        ("org/gated", "access is gated; ask for it at"),
        ("org/denied", "access denied (HTTP 403)"),
        ("org/h5", "only tf_model.h5; convert"),
        ("org/a--b", "not a valid hub id"),
    ],
)
def test_refusals(ask, name, message):
    error = ask(name)
    assert error.startswith(f"{name}: ")
    assert message in error


def test_stored_token_that_is_not_there(ask):
    assert "no token is stored" in ask("org/full", token=True)


def test_nothing_cached(hub, ask):
    for options in ({"environment": {"HF_HUB_OFFLINE": "1"}}, {"local_files_only": True}):
        assert ask("org/full", **options).startswith("org/full: not in the local cache")
    assert hub.requests == []


def test_hub_that_is_down(hub, ask):
    hub.down = True
    error = ask("org/full")
    assert error.startswith("org/full: not in the local cache")
    assert "cannot be reached (HfHubHTTPError: " in error
    assert "503" in error
    assert "cannot be reached (ConnectError" in ask(
        "org/full", {"HF_ENDPOINT": "http://127.0.0.1:9"}
    )


def test_what_a_model_needs():
    full = model_files(REPOSITORIES["org/full"], "x")
    assert set(full) == WANTED
    bins = [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
    index = "pytorch_model.bin.index.json"
    names = ["config.json", *bins, index, "pytorch_model.bin"]  # the single file is an old one
    assert model_files(names, "x") == ["config.json", index, *bins]
    with pytest.raises(CheckpointError, match=r"x: pytorch_model.bin.index.json: .* 3 .*found 2"):
        model_files(["config.json", *bins[:2], index], "x")
    with pytest.raises(CheckpointError, match="shards, found 0"):
        model_files(["config.json", index], "x")
    with pytest.raises(CheckpointError, match=r"x: no config.json"):
        model_files(["model.safetensors"], "x")
    with pytest.raises(CheckpointError, match="no weights at all"):
        model_files(["config.json", *TOKENIZER_FILES], "x")


def test_paths(tmp_path, monkeypatch):
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(folder) == resolve(str(folder)) == folder
    assert resolve("org/model") == Path("org/model")  # what exists is never looked for elsewhere
    assert resolve("~/org/model") == folder
    assert resolve(folder / "config.json") == folder / "config.json"
    with pytest.raises(CheckpointError, match="is for hub ids"):
        resolve(folder, revision="old")
    assert resolve(folder, revision="main") == folder


@pytest.mark.parametrize(
    "name", ["./a", "../a/b", "~/absent", "/absent", "a/b/c", "a/", "a\\b/c d"]
)
def test_absent_paths(name):
    with pytest.raises(CheckpointError, match="no such folder or file"):
        resolve(name)


@pytest.mark.parametrize("name", ["opt-125m", "gpt2", "", "a b", "a\\b"])
def test_names_that_are_nothing(name):
    with pytest.raises(CheckpointError, match='"mini", or a hub id such as "facebook/opt-125m"'):
        resolve(name)


def test_mini(monkeypatch, tmp_path):
    monkeypatch.setattr("opt_core.hub.__file__", str(tmp_path / "hub.py"))
    with pytest.raises(CheckpointError, match="embedded model is missing"):
        resolve("mini")
    (tmp_path / "mini").mkdir()
    (tmp_path / "mini" / "config.json").write_text("{}")
    assert resolve("mini") == tmp_path / "mini"
    with pytest.raises(CheckpointError, match="is for hub ids"):
        resolve("mini", revision="old")


def test_huggingface_hub_is_loaded_only_for_the_hub():
    code = "import sys, opt_core.hub; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
