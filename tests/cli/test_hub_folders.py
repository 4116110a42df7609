"""`opt-lm download` and `opt-lm push`: huggingface_hub's own client, and a hub of this machine."""

import base64
import json
import shutil
from typing import Any

import pytest
from huggingface_hub import constants

from opt_core.hub import TOKENIZER_FILES
from tests.support.files.hub_here import lead
from tests.support.files.lying_hub import Handler, serving
from tests.support.files.tiny_folder import save_model


class Hub(Handler):
    """Sends the files that it has, breaks off where it is told to, and takes commits."""

    breaks = 0
    asked: list[str]
    commits: list[list[dict[str, Any]]]

    def send(self, name: str, path: Any) -> None:
        if self.command == "GET":
            self.asked.append(f"{path.name} {self.headers.get('Range', '')}".strip())
        if self.command == "GET" and Hub.breaks and path.name == "model.safetensors":
            Hub.breaks -= 1
            data = path.read_bytes()
            headers = {"ETag": '"x"', "Content-Length": str(len(data))}
            self.reply(200, data[: len(data) // 2], **headers)
            self.close_connection = True
            return None
        if (start := self.headers.get("Range", "").removeprefix("bytes=")) and start.endswith("-"):
            data, first = path.read_bytes(), int(start[:-1])
            whole = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self.reply(206, data[first:], ETag='"x"', Content_Range=whole)
        return super().send(name, path)

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        if self.command == "HEAD":  # of a file: its own length
            headers |= {"ETag": '"x"'}
        super().reply(status, body, **headers)

    do_HEAD = Handler.do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            about = json.loads(body)
            if about["name"] == "taken":
                return self.reply(403, b"no rights here")
            self.asked.append(f"create {about['name']} {about.get('visibility', '')}".strip())
            return self.tell({"url": f"{self.hub.url}/me/{about['name']}"})
        if self.path.endswith("/validate-yaml"):
            return self.tell({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            told = {"uploadMode": "regular", "shouldIgnore": False}
            files = json.loads(body)["files"]
            return self.tell({"files": [{"path": f["path"], **told} for f in files]})
        if "/commit/" in self.path:
            self.asked.append(self.path.partition("/commit/")[2])
            self.commits.append([json.loads(line) for line in body.decode().splitlines()])
            url = f"{self.hub.url}/me/my/commit/1"
            return self.tell({"commitUrl": url, "commitOid": "1", "success": True})
        return self.reply(404)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    Hub.asked, Hub.commits, Hub.breaks = [], [], 0
    with serving(Hub) as hub:
        lead(monkeypatch, hub.url, tmp_path / "hf")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield hub


@pytest.fixture
def theirs(hub, tmp_path):
    """A repository: a model, the same weights in other formats, and more."""
    folder = save_model(tmp_path / "theirs")
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "notes.txt"):
        (folder / name).write_bytes(b"other")
    for name in ("README.md", "LICENSE.md"):
        (folder / name).write_text("of theirs")
    hub.folders["org/theirs"] = folder
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_download_takes_what_a_model_needs(opt_lm, theirs, tmp_path):
    done = opt_lm("download", "org/theirs", tmp_path / "mine", "--json")
    assert done.code == 0, done.err
    wanted = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    wanted |= {"LICENSE.md", *(name for name in TOKENIZER_FILES if (theirs / name).exists())}
    found = contents(tmp_path / "mine")
    assert found.keys() == wanted == json.loads(done.out)["files"].keys()
    assert all(found[name] == (theirs / name).read_bytes() for name in wanted)
    assert opt_lm("info", tmp_path / "mine").code == 0
    Hub.asked.clear()
    again = opt_lm("download", "org/theirs", tmp_path / "mine")
    assert (again.code, Hub.asked) == (0, [])  # nothing is sent twice
    assert again.out.startswith(f"{tmp_path / 'mine'}: {len(wanted)} files, ")


def test_download_goes_on_where_it_was_broken_off(opt_lm, theirs, tmp_path, monkeypatch):
    """In the middle of a file within a command; from one command to the next, with the next file.

    Which is what huggingface_hub keeps: it throws half a file away at its end.
    """
    # What is tried again is so at once: their client would wait for a second before each time.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    half = (theirs / "model.safetensors").stat().st_size // 2000 * 1000
    Hub.breaks = 1
    with monkeypatch.context() as patch:
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        assert opt_lm("download", "org/theirs", tmp_path / "mine").code == 0
    assert f"model.safetensors bytes={half}-" in Hub.asked
    assert contents(tmp_path / "mine")["model.safetensors"] == contents(theirs)["model.safetensors"]
    Hub.breaks = 99
    done = opt_lm("download", "org/theirs", tmp_path / "more")
    assert done.code == 2
    told = done.err.splitlines()[-1]
    assert told.startswith("error: org/theirs: the download failed (")
    assert told.endswith("; run it again, what came is kept")
    assert not (tmp_path / "more" / "model.safetensors").exists()
    Hub.breaks = 0
    Hub.asked.clear()
    assert opt_lm("download", "org/theirs", tmp_path / "more").code == 0
    assert Hub.asked == ["model.safetensors"]
    assert contents(tmp_path / "more") == contents(tmp_path / "mine")


def test_download_refuses(opt_lm, hub, theirs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    for name, folder, message in (
        ("mini", "new", "mini: expected a hub id such as facebook/opt-125m"),
        (theirs, "new", "theirs: expected a hub id"),
        ("org/theirs", "full", "full: already exists; expected a new folder"),
        ("org/none", "new", "org/none: no such folder, and no such repository on "),
    ):
        done = opt_lm("download", name, tmp_path / folder)
        assert done.code == 2
        assert message in done.err
        assert done.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_push_sends_the_model_with_its_card(opt_lm, hub, tmp_path):
    hub.folders["me/my"] = tmp_path / "empty"
    folder = save_model(tmp_path / "model")
    done = opt_lm("push", folder, "me/my", "--private", "--message", "First", "--revision", "next")
    assert done.code == 0, done.err
    assert done.out == f"{hub.url}/me/my/commit/1\n"
    assert Hub.asked == ["create my private", "next"]
    ((head, *files),) = Hub.commits
    assert head["value"]["summary"] == "First"
    sent = {f["value"]["path"]: base64.b64decode(f["value"]["content"]) for f in files}
    assert sent == contents(folder)
    assert "README.md" in sent
    assert b"pipeline_tag: text-generation" in sent["README.md"]
    (folder / "README.md").write_text("---\ntags:\n- mine\n---\nMy own.\n")
    assert opt_lm("push", folder, "me/my").code == 0
    sent = {f["value"]["path"]: base64.b64decode(f["value"]["content"]) for f in Hub.commits[1][1:]}
    assert sent["README.md"].endswith(b"My own.\n")


def test_push_refuses(opt_lm, hub, tmp_path):
    folder = save_model(tmp_path / "model")
    done = opt_lm("push", folder, "me/taken")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "me/taken: not uploaded (" in done.err
    shutil.copytree(folder, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    done = opt_lm("push", tmp_path / "broken", "me/my")
    assert done.code == 2
    assert "broken: not uploaded: " in done.err
    assert opt_lm("push", tmp_path / "none", "me/my").err.endswith("none: no such folder\n")
    assert Hub.commits == []
