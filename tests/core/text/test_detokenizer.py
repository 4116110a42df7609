"""Streaming: the pieces are the text, no character is split, and stop strings are never missed."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_core.errors import GenerationError, TokenizerError
from opt_core.text.detokenizer import Detokenizer, StopStringTracker
from opt_core.text.tokenizer import OPTTokenizer
from tests.support.small_tokenizer import write_opt_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(write_opt_folder(tmp_path_factory.mktemp("opt")))


def bytes_to_ids(tokenizer: OPTTokenizer, data: bytes) -> list[int]:
    """One token per byte, whatever the merges would make of them."""
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [single[bytes([byte])] for byte in data]


@settings(max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_pieces_add_up_to_decode(tokenizer, data, skip):
    """Any ids at all: most such rows are no valid UTF-8, and tokens end inside characters."""
    size = tokenizer.vocab_size
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=30))
    ids += bytes_to_ids(tokenizer, data.draw(st.binary(max_size=12)))
    stream = Detokenizer(tokenizer, skip_special_tokens=skip)
    text = "".join(map(stream.push, ids)) + stream.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)


def test_no_character_is_split(tokenizer):
    text = "añ日👩‍👩‍👧e\u0301"
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token_id) for token_id in bytes_to_ids(tokenizer, text.encode())]
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.flush() == ""


def test_a_character_may_go_on_after_a_special_token(tokenizer):
    first, second = bytes_to_ids(tokenizer, "é".encode())
    stream = Detokenizer(tokenizer)
    assert [stream.push(token_id) for token_id in (first, 2, second)] == ["", "", "é"]


def test_flush_shows_what_was_never_finished_and_starts_anew(tokenizer):
    first, second = bytes_to_ids(tokenizer, "é".encode())
    stream = Detokenizer(tokenizer)
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(second) + stream.flush() == "\ufffd"
    assert stream.push(first) + stream.push(second) == "é"


def test_unknown_ids_raise(tokenizer):
    with pytest.raises(TokenizerError, match="no token has id"):
        Detokenizer(tokenizer).push(tokenizer.vocab_size)
    with pytest.raises(TokenizerError, match="no token has id"):
        StopStringTracker(tokenizer, "a").push(tokenizer.vocab_size)


def stopped_at(tokenizer, stop_strings, ids) -> list[int]:
    tracker = StopStringTracker(tokenizer, stop_strings)
    return [i for i, token_id in enumerate(ids) if tracker.push(token_id)]


def test_stop_string_inside_and_across_tokens(tokenizer):
    ids = tokenizer.encode("the quick brown fox jumps over the lazy dog", add_special_tokens=False)
    tokens = [tokenizer.decode([token_id]) for token_id in ids]
    assert len(tokens) < len("".join(tokens))  # some tokens are longer than a letter
    for stop in ("the", "he q", "x", "own fox", "zy do", "the quick"):
        stops = stopped_at(tokenizer, stop, ids)
        ends = [match.end() for match in re.finditer(f"(?={stop})", "".join(tokens))]
        ends = [end + len(stop) for end in ends]
        positions, length = [], 0
        for i, token in enumerate(tokens):
            if any(length < end <= length + len(token) for end in ends):
                positions.append(i)
            length += len(token)
        assert stops == positions, stop
    assert stopped_at(tokenizer, "absent", ids) == []


def test_stop_string_must_end_in_the_newest_token(tokenizer):
    dog = tokenizer.encode(" dog", add_special_tokens=False)
    more = tokenizer.encode(" the lazy", add_special_tokens=False)
    assert stopped_at(tokenizer, ["dog", "zz"], dog + more) == [len(dog) - 1]


def test_stop_string_with_characters_split_over_tokens(tokenizer):
    ids = bytes_to_ids(tokenizer, "a👩é!".encode())
    assert stopped_at(tokenizer, "é", ids) == [6]
    assert stopped_at(tokenizer, ["👩", "!"], ids) == [4, 7]


def test_special_tokens_count_with_their_text(tokenizer):
    a, b = bytes_to_ids(tokenizer, b"ab")
    assert stopped_at(tokenizer, "</s>", [a, 2, b]) == [1]
    assert stopped_at(tokenizer, "ab", [a, 2, b]) == []
    assert stopped_at(tokenizer, "ab", [a, b]) == [1]


@settings(max_examples=200)
@given(data=st.data())
def test_stop_strings_like_a_search_of_the_text(tokenizer, data):
    """The definition itself: it stops where the text so far has a match that it lacked before."""
    ids = bytes_to_ids(tokenizer, data.draw(st.text("ab", max_size=20)).encode())
    ids += tokenizer.encode(data.draw(st.text("abé ", max_size=20)))
    stops = data.draw(st.lists(st.text("abé ", min_size=1, max_size=4), min_size=1, max_size=3))

    def matches(count: int) -> int:
        text = b"".join(tokenizer.token_bytes(i, skip_special_tokens=False) for i in ids[:count])
        return sum(len(re.findall(b"(?=" + re.escape(s.encode()) + b")", text)) for s in stops)

    expected = [i for i in range(len(ids)) if matches(i + 1) > matches(i)]
    assert stopped_at(tokenizer, stops, ids) == expected


@pytest.mark.parametrize("stops", ["", [], ["a", ""], [b"a"], [1]])
def test_bad_stop_strings(tokenizer, stops):
    with pytest.raises(GenerationError, match="stop_strings"):
        StopStringTracker(tokenizer, stops)
