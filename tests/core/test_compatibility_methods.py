"""Methods of `transformers` that need no framework: other sizes of a table, uploads."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core.compatibility.methods import MethodsMixin, resize_table
from opt_core.compatibility.names import REFUSED
from opt_core.compatibility.upload import UploadMixin
from opt_core.errors import CheckpointError, UnsupportedError
from tests.support.files.hub_here import lead
from tests.support.files.lying_hub import Handler, serving


def test_new_rows_are_drawn_around_the_old_ones():
    """As narrowly as transformers: a billionth of their covariance."""
    old = np.random.default_rng(0).normal(0.3, 0.5, (500, 3)).astype(np.float32)
    old[:, 1] += old[:, 0]
    new = resize_table(old, 10_500, None)
    np.testing.assert_array_equal(new[:500], old)
    added = new[500:].astype(np.float64)
    np.testing.assert_allclose(added.mean(0), old.mean(0), atol=1e-6)
    scaled = np.cov((added - old.mean(0)).T / np.sqrt(1e-9))
    np.testing.assert_allclose(scaled, np.cov(old.T), rtol=0.1, atol=0.02)
    wide = resize_table(old, 10_500, 0.02)[500:]
    np.testing.assert_allclose((wide.mean(), wide.std()), (0, 0.02), rtol=0.02, atol=1e-3)


def test_rows_are_taken_from_the_end_and_types_stay():
    old = np.arange(12, dtype=np.float16).reshape(4, 3)
    np.testing.assert_array_equal(resize_table(old, 2, None), old[:2])
    assert resize_table(old, 9, None).dtype == np.float16


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_method_and_a_way_out(name):
    with pytest.raises(UnsupportedError, match=rf"MethodsMixin\.{name} is not supported: \w+"):
        getattr(MethodsMixin(), name)(1, two=2)
    assert issubclass(UnsupportedError, NotImplementedError)


class Saved(UploadMixin):
    def save_pretrained(self, folder: Any, max_shard_size: str = "5GB") -> None:
        Path(folder, "config.json").write_text(json.dumps({"size": max_shard_size}))


class Uploads(Handler):
    """A hub that takes small files."""

    asked: list[tuple[str, str]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, body.decode()))
        if self.path.endswith("/repos/create"):
            name = json.loads(body)["name"]
            if name == "taken":
                return self.reply(403, b"no rights here")
            return self.tell({"url": f"{self.hub.url}/me/{name}"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            told = {"uploadMode": "regular", "shouldIgnore": False}
            return self.tell({"files": [{"path": f["path"], **told} for f in files]})
        return self.tell({"commitUrl": f"{self.hub.url}/me/my/commit/1", "commitOid": "1"})


def test_what_is_saved_is_uploaded(tmp_path, monkeypatch):
    with serving(Uploads) as hub:
        Uploads.asked = []
        lead(monkeypatch, hub.url, tmp_path / "hf")
        hub.folders["me/my"] = tmp_path
        model = Saved()
        model.model_tags = ("opt",)
        model.push_to_hub("my", token="hf_x", tags="tiny", max_shard_size="1MB", private=True)
        create, *_, (path, commit) = Uploads.asked
        assert json.loads(create[1])["visibility"] == "private"
        assert path.endswith("/models/me/my/commit/main")
        assert '"summary": "Upload Saved"' in commit
        assert re.findall(r'"path": "(.*?)"', commit) == ["README.md", "config.json"]
        with pytest.raises(CheckpointError, match="taken: not uploaded"):
            model.push_to_hub("taken", token="hf_x")
