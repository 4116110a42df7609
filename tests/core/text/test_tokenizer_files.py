"""Files of a tokenizer that are damaged, missing or at odds, and what is said of them."""

import json
from pathlib import Path

import pytest

from opt_core.errors import OPTError, TokenizerError
from opt_core.text.tokenizer import OPTTokenizer
from tests.support.small_tokenizer import OPT_CONFIG, trained, write_config, write_opt_folder


@pytest.fixture
def copy(tmp_path) -> Path:
    """A folder to damage."""
    return write_opt_folder(tmp_path / "copy")


def stale_vocab(folder: Path) -> None:
    OPTTokenizer.from_pretrained(folder).save_pretrained(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


def change_vocab(**changes):
    def change(folder: Path) -> None:
        vocabulary = json.loads((folder / "vocab.json").read_text()) | changes
        (folder / "vocab.json").write_text(json.dumps(vocabulary))

    return change


def write(name: str, contents: str | bytes):
    data = contents.encode() if isinstance(contents, str) else contents
    return lambda folder: (folder / name).write_bytes(data)


def add_merge(line: str):
    def change(folder: Path) -> None:
        with (folder / "merges.txt").open("a") as file:
            file.write(line + "\n")

    return change


def config(**changes):
    return lambda folder: write_config(folder, OPT_CONFIG | changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (write("vocab.json", ""), "vocab.json: not valid JSON"),
        (write("vocab.json", "{"), "vocab.json: not valid JSON"),
        (write("vocab.json", "{}"), "vocab.json: no tokens"),
        (write("vocab.json", "[1]"), "vocab.json: expected a JSON object"),
        (write("vocab.json", b"\xff\xfe"), "vocab.json: not valid JSON"),
        (change_vocab(x="5"), "vocab.json: 'x': expected an id >= 0, received '5'"),
        (change_vocab(x=-1), "vocab.json: 'x': expected an id >= 0"),
        (change_vocab(zzz=7), "vocab.json: id 7 belongs to both .* and 'zzz'"),
        (stale_vocab, "vocab.json: 'a' has id .* stale"),
        (write("merges.txt", ""), "merges.txt: no merges"),
        (write("merges.txt", b"\xff"), "merges.txt: not readable"),
        (add_merge("qq zz"), r"merges.txt: line \d+: 'qq' is not in vocab.json"),
        (add_merge("q z"), r"merges.txt: line \d+: 'qz' is not in vocab.json"),
        (add_merge("a b c"), r"merges.txt: line \d+: expected two tokens"),
        (add_merge("a"), r"merges.txt: line \d+: expected two tokens"),
        (lambda folder: (folder / "merges.txt").unlink(), "no merges.txt beside vocab.json"),
        (lambda folder: (folder / "vocab.json").unlink(), "no vocab.json beside merges.txt"),
        (write("tokenizer.json", "{}"), "tokenizer.json: expected a BPE model"),
        (write("tokenizer.json", "nonsense"), "tokenizer.json: not valid JSON"),
        (
            write("tokenizer.json", '{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}'),
            "tokenizer.json: not a tokenizer",
        ),
        (write("tokenizer_config.json", "}"), "tokenizer_config.json: not valid JSON"),
        (config(add_bos_token="yes"), "add_bos_token: expected true or false"),
        (config(add_eos_token=True), "add_eos_token=True is not supported"),
        (config(pad_token=3), "tokenizer_config.json: expected a token, received 3"),
        (config(extra_special_tokens="x"), "extra_special_tokens: expected a list"),
        (config(added_tokens_decoder={"x": "y"}), "expected integer ids"),
        (config(added_tokens_decoder={"5": "</s>"}), "'</s>' has id 5, but 2"),
        (config(added_tokens_decoder={"99999": "[far]"}), r"'\[far\]' has id 99999"),
        (write("added_tokens.json", '{"[x]": null}'), "added_tokens.json: .*integer ids"),
    ],
)
def test_damaged_files(copy, damage, message):
    damage(copy)
    with pytest.raises(TokenizerError, match=message) as caught:
        OPTTokenizer.from_pretrained(copy)
    assert str(copy) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_files(tmp_path):
    with pytest.raises(TokenizerError, match=r"no vocab\.json and no tokenizer\.json"):
        OPTTokenizer.from_pretrained(tmp_path)
    with pytest.raises(OPTError, match="no such folder"):
        OPTTokenizer.from_pretrained(tmp_path / "absent")


def test_other_kinds_of_tokenizer_are_refused(tmp_path):
    backend = trained()
    backend.decoder = None
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="ByteLevel decoder, received BPE, None"):
        OPTTokenizer.from_pretrained(tmp_path)
