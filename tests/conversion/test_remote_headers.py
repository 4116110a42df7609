"""Checkpoints on a hub, which is asked for their headers only, and does not always tell the truth.

The hub is played by a server on this machine; `huggingface_hub` is led there.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import conversion
from opt_cli.main import main
from opt_core.params import count_parameters
from tests.support.files import quantized_fixtures as files
from tests.support.files.checkpoint_fixtures import EMBEDDING, TINY
from tests.support.files.format_fixtures import make
from tests.support.files.hub_here import lead
from tests.support.files.lying_hub import Handler, Hub, serving, whole
from tests.support.small_tokenizer import write_opt_folder

Info = Callable[[str], tuple[int, dict[str, Any], str]]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as served:
        lead(monkeypatch, served.url, tmp_path / "hf")
        yield served


@pytest.fixture
def info(capsys: pytest.CaptureFixture[str]) -> Info:
    """Exit code and answer of `opt-lm info`, and what it said on stderr."""

    def ask(name: str) -> tuple[int, dict[str, Any], str]:
        with pytest.raises(SystemExit) as end:
            main(["info", name, "--json"])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), json.loads(out or "{}"), err

    return ask


SPREAD = {
    "safetensors": "1MB",
    "torch-bin": "5GB",
    "tf-h5": "5GB",
    "flax-msgpack": "1MB",
    "keras-hub": "5GB",
}


def test_of_a_hub_id_only_headers_are_read(hub: Hub, info: Info, tmp_path: Path):
    config = TINY.replace(vocab_size=40_000, hidden_size=16, ffn_dim=20)
    make(tmp_path / "original", config)
    write_opt_folder(tmp_path / "original")
    size = 0
    for to, shard in SPREAD.items():
        conversion.convert(tmp_path / "original", tmp_path / to, to, max_shard_size=shard)
        hub.folders[f"org/{to}"] = tmp_path / to
        code, found, err = info(f"org/{to}")
        assert (code, err) == (0, ""), found
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
    assert hub.sent < 1_500_000 < size / 5


def test_a_stale_file_on_the_hub_is_told(hub: Hub, info: Info, tmp_path: Path):
    make(tmp_path / "a")
    conversion.convert(tmp_path / "a", tmp_path / "b", "flax-msgpack", max_shard_size="1KB")
    (tmp_path / "b" / "flax_model.msgpack").write_bytes(b"from before the index")
    hub.folders["org/model"] = tmp_path / "b"
    code, found, _ = info("org/model")
    assert code == 1
    assert found["problems"][0].startswith("org/model/flax_model.msgpack: not read: flax_model.m")


def test_what_is_wrong_on_the_hub_is_told_and_nothing_is_downloaded(
    hub: Hub, info: Info, tmp_path: Path
):
    weights = make(tmp_path / "source", TINY.replace(vocab_size=40_000))
    TINY.replace(vocab_size=40_000, num_hidden_layers=3).save_pretrained(tmp_path / "source")
    hub.folders["org/model"] = tmp_path / "source"
    code, found, _ = info("org/model")
    assert code == 1
    (problem,) = found["problems"]
    assert problem.startswith("org/model: weights and configuration do not fit: 16 missing")
    hub.parts["org/model"] = whole
    code, _, err = info("org/model")
    assert code == 2
    assert "does not give parts of it" in err
    assert hub.sent < weights[EMBEDDING].nbytes + 1_000_000
    del hub.parts["org/model"]
    (tmp_path / "source" / "model.safetensors").write_bytes(b"\xff" * 100)
    code, found, _ = info("org/model")
    assert code == 1
    assert "org/model/model.safetensors: not a sound safetensors file" in found["problems"][0]
    code, _, err = info("org/absent")
    assert code == 2
    assert "no such repository" in err


def redirect(to: str) -> Callable[[Handler, bytes, int, int], None]:
    return lambda request, data, start, stop: request.reply(302, Location=to)


def hang_up(request: Handler, data: bytes, start: int, stop: int) -> None:
    """Announces more than comes."""
    request.reply(206, data[start : stop - 7], Content_Length=str(stop - start))
    request.close_connection = True


PARTS: dict[str, Callable[[Handler, bytes, int, int], None]] = {
    "too little": lambda r, data, start, stop: r.reply(206, data[start : stop - 1]),
    "nothing": lambda r, data, start, stop: r.reply(206),
    "too much": lambda r, data, start, stop: r.reply(206, data[start:stop] + bytes(1 << 22)),
    "all of it": whole,
    "no range": lambda r, data, start, stop: r.reply(416),
    "an error": lambda r, data, start, stop: r.reply(500),
    "a refusal": lambda r, data, start, stop: r.reply(403),
    "the end of the line": hang_up,
    "a redirect to itself": lambda r, *_: r.reply(302, Location=r.path),
    "a redirect to a file": redirect("file:///etc/passwd"),
    "a redirect to nowhere": redirect("http://127.0.0.1:9/"),
    "no gzip": lambda r, data, start, stop: r.reply(206, data[start:stop], Content_Encoding="gzip"),
}
ABOUT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "one byte more": lambda info: sized(info, lambda size: size + 1),
    "a petabyte": lambda info: sized(info, lambda size: 10**15),
    "an exabyte": lambda info: sized(info, lambda size: 10**18),
    "less than nothing": lambda info: sized(info, lambda size: -size),
    "nothing": lambda info: sized(info, lambda size: 0),
    "a word": lambda info: sized(info, lambda size: "large"),
    "no files": lambda info: {**info, "siblings": []},
    "files of another kind": lambda info: {**info, "siblings": [3]},
    "a list": lambda info: [info],
    "a path out": lambda info: {
        **info,
        "siblings": [*info["siblings"], {"rfilename": "../../tf_model.h5", "size": 9}],
    },
}


def sized(info: dict[str, Any], change: Callable[[int], Any]) -> dict[str, Any]:
    siblings = [
        {**s, "size": change(s["size"]) if s["rfilename"].startswith("model.") else s["size"]}
        for s in info["siblings"]
    ]
    return {**info, "siblings": siblings}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "model"
    make(folder)
    return folder


@pytest.mark.parametrize("lie", PARTS)
def test_parts_that_are_none_are_refused(lie: str, hub: Hub, info: Info, sound: Path):
    hub.folders["org/model"], hub.parts["org/model"] = sound, PARTS[lie]
    code, found, err = info("org/model")
    assert (code, found) == (2, {})
    assert err.startswith("error: org/model")
    assert len(err.splitlines()) == 1
    assert hub.sent < 1 << 23


@pytest.mark.parametrize("lie", ABOUT)
def test_sizes_and_names_that_lie_are_told(lie: str, hub: Hub, info: Info, sound: Path):
    hub.folders["org/model"], hub.about["org/model"] = sound, ABOUT[lie]
    code, found, err = info("org/model")
    assert code == (0 if lie == "a path out" else 1 if found else 2)
    assert all("org/model" in line for line in found.get("problems", [err]))
    assert len(err.splitlines()) == (code == 2)
    assert found.get("files", {}).keys() <= {"model.safetensors"}
    assert hub.sent < 1 << 20


@pytest.mark.parametrize("make_files", [files.packed, files.four_bits, files.gptq, None])
def test_quantised_weights_are_described_by_their_headers(
    make_files: Callable[[], files.Made] | None, hub: Hub, info: Info, tmp_path: Path
):
    if make_files is None:
        conversion.convert("mini", tmp_path / "here", quantize="int4")
    else:
        make_files().write(tmp_path / "here")
    hub.folders["org/small"] = tmp_path / "here"
    code, found, err = info("org/small")
    assert (code, err) == (0, ""), found
    local = conversion.describe(tmp_path / "here")
    assert found["quantization"] == local.quantization is not None
    assert [tuple(t["shape"]) for t in found["tensors"]] == [t.shape for t in local.tensors]
    assert found["files"] == local.files
