"""The same ids, text and stops as `transformers`' OPT tokenizer, with the real vocabulary."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_core.text.detokenizer import StopStringTracker
from opt_core.text.tokenizer import OPTTokenizer
from tests.support.small_tokenizer import (
    OPT_CONFIG,
    SPECIAL,
    trained,
    write_config,
    write_real_folder,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

NASTY = [
    "",
    " ",
    "      ",
    "\n\n \n",
    "\r\n",
    "\x00",
    "a\x00b\x01\x02\x7f\x80\x9f",
    "\ufeffbom",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈",
    "日本語のテキスト、中文。한국어",
    "e\u0301 a\u0300\u0316 \u200d\u200b\u2028\u2029\u00a0",
    "مرحبا שלום",
    "x" * 3000,
    "antidisestablishmentarianism" * 30,
    "</s>",
    "<pad>",
    "<s>",
    "<mask><unk><|endoftext|>madeupword0000",
    "a </s> b<pad>c</s></s>  <pad>",
    "</s",
    "it's we'll I'VE don't",
    "1234567890 3.14 1e-5",
    "Ġ Ċ ĉ",
    "def f(x):\n\treturn  x  # no",
    "\U0010ffff\ud7ff\ue000",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_real_folder(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def ours(folder):
    return OPTTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_nasty_texts(ours, theirs, text):
    assert ours.encode(text) == theirs(text).input_ids
    assert (
        ours.encode(text, add_special_tokens=False)
        == theirs(text, add_special_tokens=False).input_ids
    )


@settings(max_examples=1000, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab </s><pad>.,'\n1é😀"))
def test_any_text(ours, theirs, text):
    assert ours.encode(text) == theirs(text).input_ids


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 50264), max_size=40), skip=st.booleans())
def test_any_ids(ours, theirs, ids, skip):
    assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_and_pairs(ours, theirs, side):
    texts, seconds = ["Hello world", "I like", "a b c d e f"], ["dogs", "your little dog", "x"]
    for pair in (None, seconds):
        expected = theirs(texts, pair, padding=True, padding_side=side, return_tensors="np")
        actual = ours(texts, pair, padding_side=side)
        np.testing.assert_array_equal(actual.input_ids, expected["input_ids"])
        np.testing.assert_array_equal(actual.attention_mask, expected["attention_mask"])


def test_truncation(ours, theirs):
    text = "I like your little dog, and the world"
    expected = theirs(text, max_length=5, truncation=True).input_ids
    assert ours(text, max_length=5, truncation=True).input_ids == expected


@pytest.mark.parametrize("add_bos", [True, False])
def test_transformers_reads_what_we_write(folder, tmp_path, add_bos):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (source / name).symlink_to(folder / name)
    write_config(source, OPT_CONFIG | {"add_bos_token": add_bos})
    ours, saved = OPTTokenizer.from_pretrained(source), tmp_path / "saved"
    ours.save_pretrained(saved)
    readers = [transformers.AutoTokenizer.from_pretrained(saved)]
    readers += [
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(saved / "tokenizer.json")),
        transformers.GPT2Tokenizer.from_pretrained(saved),
    ]
    (saved / "tokenizer.json").unlink()
    readers += [transformers.AutoTokenizer.from_pretrained(saved)]
    for text in NASTY:
        expected = [ours.encode(text)] * len(readers)
        assert [reader(text).input_ids for reader in readers] == expected, text
    named = readers[-1]
    assert (named.bos_token_id, named.pad_token_id) == (ours.bos_token_id, ours.pad_token_id)


def test_we_read_what_transformers_writes(theirs, tmp_path):
    """It writes no add_bos_token: the post-processor of tokenizer.json alone has it."""
    theirs.save_pretrained(tmp_path)
    assert "add_bos_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    ours = OPTTokenizer.from_pretrained(tmp_path)
    for text in NASTY:
        assert ours.encode(text) == theirs(text).input_ids
    assert (ours.bos_token_id, ours.pad_token_id) == (2, 1)


def test_tokens_added_with_transformers(folder, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<turn>"]})
    theirs.add_tokens(["plain word"])
    theirs.save_pretrained(tmp_path)
    ours = OPTTokenizer.from_pretrained(tmp_path)
    text = "a plain word<turn>[PAD] b <pad>"
    assert ours.encode(text) == theirs(text).input_ids
    ids = ours.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.vocab_size, len(ours)) == (theirs.vocab_size, len(theirs))
    assert ours.pad_token_id == theirs.pad_token_id
    ours.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(text).input_ids == ids
    assert again.pad_token_id == ours.pad_token_id


def test_galactica_like_folder_with_a_model(tmp_path):
    backend = trained()
    pre = transformers.PreTrainedTokenizerFast  # what its tokenizer_config.json names
    from tokenizers import normalizers, pre_tokenizers

    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    backend.add_special_tokens(SPECIAL)
    backend.save(str(tmp_path / "tokenizer.json"))
    ours, saved = OPTTokenizer.from_pretrained(tmp_path), tmp_path / "saved"
    ours.save_pretrained(saved)
    transformers.OPTConfig().save_pretrained(saved)
    text = "I like 12345 dogs</s> ﬁne"
    expected = pre(tokenizer_file=str(tmp_path / "tokenizer.json"))(text).input_ids
    assert ours.encode(text) == expected
    assert transformers.AutoTokenizer.from_pretrained(saved)(text).input_ids == expected


@settings(max_examples=8, deadline=None)  # the reference first matches all 50265 tokens
@given(
    text=st.text("abcdst op\n.é😀", max_size=30),
    stop=st.text("abst op\n.é😀", min_size=1, max_size=4),
)
def test_stop_strings(ours, theirs, text, stop):
    ids = ours.encode(text, add_special_tokens=False)
    criterion = transformers.StopStringCriteria(theirs, stop)
    tracker = StopStringTracker(ours, stop)
    for count in range(1, len(ids) + 1):
        expected = criterion(torch.tensor([ids[:count]]), None).item()
        assert tracker.push(ids[count - 1]) == expected, (ids[:count], stop)
