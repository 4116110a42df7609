"""Tokenising in bulk gives the ids of the library, character for character."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_core import OPTTokenizer
from opt_core.data.tokenization import BulkTokenizer, end_token, start_tokens
from opt_core.errors import DataError
from tests.support.small_tokenizer import OPT_CONFIG, trained, write_config, write_opt_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(write_opt_folder(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def bulk(tokenizer: OPTTokenizer) -> BulkTokenizer:
    bulk = BulkTokenizer(tokenizer)
    assert bulk.is_fast
    return bulk


def ids(bulk: BulkTokenizer, text: str) -> list[int]:
    return np.frombuffer(bulk(text), bulk.dtype).tolist()


def test_characters_are_cut_as_the_library_cuts_them(tokenizer: OPTTokenizer, bulk: BulkTokenizer):
    """All at which a class of characters begins or ends: where the tables could differ."""
    kinds = [
        "" if 0xD800 <= c < 0xE000 else unicodedata.category(chr(c))[0] for c in range(1 << 17)
    ]
    codes = {d for c in range(1, len(kinds)) if kinds[c] != kinds[c - 1] for d in (c - 1, c)}
    for c in (chr(code) for code in codes if kinds[code]):
        text = f"a{c}b 1{c}2 {c}{c} '{c}s{c}'s{c} .{c}.{c} {c}"
        assert ids(bulk, text) == tokenizer.encode(text, add_special_tokens=False), repr(c)


TRICKY = st.sampled_from(
    [
        *"aZé9²½_ \t\n\r'\u2019.,!<>/s日\u0661ß",
        "'s",
        "'ll",
        "  ",
        "\n\n",
        "dog",
        " the",
        "🎉",
        "\u0301",
        "\xa0",
    ]
)


@settings(max_examples=200, deadline=None)
@given(text=st.lists(TRICKY, max_size=30).map("".join))
def test_any_text_gives_the_ids_of_the_library(
    tokenizer: OPTTokenizer, bulk: BulkTokenizer, text: str
):
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert ids(bulk, text) == expected
    assert ids(bulk, text) == expected  # from what is kept, the second time


def test_a_special_token_in_a_text_is_text(tokenizer: OPTTokenizer, bulk: BulkTokenizer):
    assert 2 in tokenizer.encode("one</s>two", add_special_tokens=False)
    found = ids(bulk, "one</s>two")
    assert not {0, 1, 2, 3} & set(found)
    assert tokenizer.decode(found) == "one</s>two"
    assert 2 in tokenizer.encode("one</s>two", add_special_tokens=False)  # ours is a copy


def test_other_cuts_are_left_to_the_library(tmp_path: Path):
    backend = trained()
    contents = json.loads(backend.to_str())
    contents["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, contents["pre_tokenizer"]],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    write_config(tmp_path, OPT_CONFIG)
    tokenizer = OPTTokenizer.from_pretrained(tmp_path)
    bulk = BulkTokenizer(tokenizer)
    assert not bulk.is_fast
    text = "in 1984 it is 12 o'clock"
    assert ids(bulk, text) == tokenizer.encode(text, add_special_tokens=False)


def test_what_goes_around_documents(tokenizer: OPTTokenizer, tmp_path: Path):
    assert (start_tokens(tokenizer), end_token(tokenizer)) == ([2], 2)
    bare = write_opt_folder(tmp_path / "bare", {**OPT_CONFIG, "add_bos_token": False})
    assert start_tokens(OPTTokenizer.from_pretrained(bare)) == []


def test_words_without_number_are_not_all_kept(
    bulk: BulkTokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("opt_core.data.tokenization._MOST_WORDS", 0)
    before = len(bulk._words)
    assert ids(bulk, "never seen before") == ids(bulk, "never seen before")
    assert len(bulk._words) == before


def test_an_end_token_is_needed(monkeypatch: pytest.MonkeyPatch, tokenizer: OPTTokenizer):
    monkeypatch.setattr(OPTTokenizer, "eos_token_id", None)
    with pytest.raises(DataError, match="need an end-of-text token between them"):
        end_token(tokenizer)
