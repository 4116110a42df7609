"""The tokenizer without any framework: ids, padding, special tokens, its files and their faults."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from opt_core.errors import TokenizerError
from opt_core.text.tokenizer import OPTTokenizer
from tests.support.small_tokenizer import (
    OPT_CONFIG,
    SPECIAL,
    trained,
    write_config,
    write_opt_folder,
    write_real_folder,
)

EMOJI = "👩‍👩‍👧‍👦"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_opt_folder(tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="module")
def tokenizer(folder) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(folder)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    """A folder of its own, to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def galactica(folder: Path) -> Path:
    """A bare tokenizer.json with rules of its own, as Galactica's repositories have."""
    backend = trained()
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    backend.add_special_tokens(SPECIAL)
    backend.enable_padding(length=9)
    backend.enable_truncation(4)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    return folder


def test_real_vocabulary_gives_the_published_ids(tmp_path):
    tokenizer = OPTTokenizer.from_pretrained(write_real_folder(tmp_path / "real"))
    published = {  # transformers issue #23768, its OPT example, and RoBERTa's sample
        "I like you.": [2, 100, 101, 47, 4],
        "Hello, my dog is a little": [2, 31414, 6, 127, 2335, 16, 10, 410],
        "Hello world! cécé herlolip": [2, 31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588],
    }
    assert {text: tokenizer.encode(text) for text in published} == published
    assert [tokenizer.decode(ids, True) for ids in published.values()] == list(published)
    assert tokenizer.vocab_size == len(tokenizer) == tokenizer.id_limit == 50265
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert named == (2, 2, 1)
    assert tokenizer.unk_token_id == 2
    with pytest.raises(TokenizerError, match=r"no token has id 50265.*< 50265"):
        tokenizer.decode([2, 50265])


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_undoes_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == 2
    if not any(special in text for special in ("</s>", "<pad>")):
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert 2 not in ids[1:]
    assert tokenizer.decode(ids) == "</s>" + text


@pytest.mark.parametrize(
    "text", ["", " ", "   a  .  b ,", "\r\n\t\x00", EMOJI, "日本語", "e\u0301", "x" * 5000]
)
def test_nasty_texts_survive(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_special_tokens_in_a_text(tokenizer):
    assert tokenizer.encode("</s><pad>", add_special_tokens=False) == [2, 1]
    assert not {0, 3} & set(tokenizer.encode("<s><unk>"))  # ordinary text to OPT's tokenizer
    assert tokenizer.decode(tokenizer.encode("a</s>b<s>"), True) == "ab<s>"
    assert [tokenizer.is_special(i) for i in range(4)] == [False, True, True, False]
    assert tokenizer.token_bytes(2) == b""
    assert tokenizer.token_bytes(2, skip_special_tokens=False) == b"</s>"
    assert tokenizer.token_bytes(0) == b"<s>"


def test_one_text_is_a_batch_of_one_where_arrays_are_asked_for(tokenizer):
    encoding = tokenizer("Hello", padding_side="right")
    assert (
        encoding.input_ids.shape
        == encoding.attention_mask.shape
        == (1, len(tokenizer.encode("Hello")))
    )
    assert encoding.input_ids.dtype == encoding.attention_mask.dtype == np.int32
    assert dict(**encoding).keys() == {"input_ids", "attention_mask"}
    with pytest.raises(KeyError):
        encoding["labels"]
    with pytest.raises(AttributeError, match="no 'labels'; it has input_ids, attention_mask"):
        _ = encoding.labels


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(tokenizer, side):
    texts = ["Hello world", "", "I like your dog, and the world"]
    encoding = tokenizer(texts, padding_side=side)
    longest = max(len(tokenizer.encode(text)) for text in texts)
    assert encoding.input_ids.shape == (3, longest)
    for text, ids, mask in zip(texts, encoding.input_ids, encoding.attention_mask, strict=True):
        alone = tokenizer.encode(text)
        padding = [1] * (longest - len(alone))
        assert ids.tolist() == (padding + alone if side == "left" else alone + padding)
        empty = [0] * len(padding)
        ones = [1] * len(alone)
        assert mask.tolist() == (empty + ones if side == "left" else ones + empty)
    assert tokenizer.batch_decode(encoding.input_ids, skip_special_tokens=True) == texts


def test_pairs_have_bos_before_each_text(tokenizer):
    first, second = tokenizer.encode("I like"), tokenizer.encode("your dog")
    assert tokenizer("I like", "your dog").input_ids == first + second
    assert tokenizer([("I like", "your dog")]).input_ids == [first + second]
    batch = tokenizer(["I like", "a"], ["your dog", ""], add_special_tokens=False)
    assert batch.input_ids[0] == first[1:] + second[1:]
    with pytest.raises(TokenizerError, match=r"expected 2 texts.*received 1"):
        tokenizer(["a", "b"], ["c"])


def test_max_length(tokenizer):
    ids = tokenizer.encode("I like your dog")
    assert tokenizer("I like your dog", max_length=len(ids)).input_ids == ids
    assert tokenizer("I like your dog", max_length=3).input_ids == ids[:3]
    cut = tokenizer("I like your dog", max_length=3, truncation=True)
    assert cut.input_ids == ids[:3]
    with pytest.warns(UserWarning, match="truncation without max_length changes nothing"):
        assert tokenizer("I like your dog", truncation=True).input_ids == ids
    with pytest.raises(TokenizerError, match="at least 1"):
        tokenizer("a", max_length=0, truncation=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\ud800", r"text 0: character 1 .*surrogate"),
        (["a", 5], "text 1: expected a string, received int"),
        (b"bytes", "received bytes"),
        (None, "received NoneType"),
    ],
)
def test_texts_that_are_none(tokenizer, text, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer(text)


def test_no_texts_are_no_rows(tokenizer):
    assert tokenizer([]) == {"input_ids": [], "attention_mask": []}
    with pytest.raises(TokenizerError, match="text: expected at least one text, received none"):
        tokenizer([], return_tensors="np")


def test_padding_side_is_checked(tokenizer):
    settings: dict[str, Any]
    for name in ("padding_side", "truncation_side"):
        settings = {name: "middle"}
        with pytest.raises(ValueError, match=f'{name}: expected "left" or "right", received'):
            OPTTokenizer.from_pretrained("mini", **settings)
    with pytest.raises(TokenizerError, match="padding_side"):
        tokenizer("a", padding_side="both")


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1.5], "expected integers"),
        (["a"], "expected integers"),
        ([True], "expected integers"),
        ([[1.5], [2]], "expected integers"),
        ([-1], "no token has id -1"),
        ([4, 99999], "no token has id 99999"),
    ],
)
def test_ids_that_are_none(tokenizer, ids, message):
    with pytest.raises(TokenizerError, match=message):
        tokenizer.decode(ids)


def test_decode_takes_what_numpy_takes(tokenizer):
    ids = tokenizer.encode("I like your dog")
    for form in (ids, tuple(ids), np.array(ids, np.int64), np.array(ids, np.uint16)):
        assert tokenizer.decode(form, True) == "I like your dog"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(ids[-1]) == tokenizer.decode(np.int32(ids[-1])) == " dog"
    assert tokenizer.batch_decode([ids, ids[:1]], True) == ["I like your dog", ""]
    assert tokenizer.decode([ids, ids[:1]], True) == ["I like your dog", ""]
    assert tokenizer.decode(np.array([ids, ids]), True) == ["I like your dog"] * 2


def test_pickle(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer)).encode("Hello") == tokenizer.encode("Hello")


@pytest.mark.parametrize("add_bos", [True, False])
def test_save_and_load(copy, tmp_path, add_bos):
    write_config(copy, OPT_CONFIG | {"add_bos_token": add_bos})
    first = OPTTokenizer.from_pretrained(copy)
    first.save_pretrained(tmp_path / "saved")
    text = "Hello</s> world, I like you"
    again = OPTTokenizer.from_pretrained(tmp_path / "saved")
    assert again.encode(text) == first.encode(text)
    assert again.add_bos == add_bos
    bare = Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert bare.encode(text).ids == first.encode(text)
    assert bare.encode(text, text).ids == first(text, text).input_ids
    # The older pair of files alone says the same, and so does tokenizer.json alone.
    (tmp_path / "saved" / "tokenizer.json").unlink()
    assert OPTTokenizer.from_pretrained(tmp_path / "saved").encode(text) == first.encode(text)
    bare.save(str(tmp_path / "tokenizer.json"))
    assert OPTTokenizer.from_pretrained(tmp_path / "tokenizer.json").encode(text) == first.encode(
        text
    )
    assert not list((tmp_path / "saved").glob(".*"))


def test_bare_vocab_and_merges_are_opt(copy):
    (copy / "tokenizer_config.json").unlink()
    tokenizer = OPTTokenizer.from_pretrained(copy)
    assert tokenizer.encode("") == [2]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1)


def test_add_prefix_space(copy):
    write_config(copy, OPT_CONFIG | {"add_prefix_space": True})
    tokenizer = OPTTokenizer.from_pretrained(copy)
    assert tokenizer.decode(tokenizer.encode("dog"), True) == " dog"


def test_special_tokens_as_objects_and_in_the_older_file(copy):
    pad = {"__type": "AddedToken", "content": "<pad>", "lstrip": True, "normalized": True}
    write_config(copy, {"add_bos_token": True})
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": pad}
    (copy / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = OPTTokenizer.from_pretrained(copy)
    ids = tokenizer.encode("a  <pad>", add_special_tokens=False)
    assert ids == [*tokenizer.encode("a", add_special_tokens=False), 1]  # lstrip took the spaces


def test_pad_token_added_by_a_fine_tune(copy, tmp_path):
    count = OPTTokenizer.from_pretrained(copy).vocab_size
    write_config(copy, OPT_CONFIG | {"pad_token": "[PAD]"})
    bare = OPTTokenizer.from_pretrained(copy)  # an id for it, as transformers gives it
    (copy / "added_tokens.json").write_text(json.dumps({"[PAD]": count}))
    older = OPTTokenizer.from_pretrained(copy)
    (copy / "added_tokens.json").unlink()
    added = {str(count): {"content": "[PAD]", "special": True}}
    write_config(copy, OPT_CONFIG | {"pad_token": "[PAD]", "added_tokens_decoder": added})
    newer = OPTTokenizer.from_pretrained(copy)
    newer.save_pretrained(tmp_path / "saved")
    for tokenizer in (bare, older, newer, OPTTokenizer.from_pretrained(tmp_path / "saved")):
        assert (tokenizer.pad_token_id, len(tokenizer)) == (count, count + 1)
        assert tokenizer.decode(tokenizer.encode("a[PAD]b"), True) == "ab"
        assert not tokenizer.is_special(1)


def test_added_tokens_keep_their_text(copy):
    """A token outside the byte alphabet's spelling is its own text, whatever letters it has."""
    count = OPTTokenizer.from_pretrained(copy).vocab_size
    (copy / "added_tokens.json").write_text(json.dumps({"crème": count}))
    tokenizer = OPTTokenizer.from_pretrained(copy)
    assert count in tokenizer.encode("la crème!")
    assert tokenizer.decode(tokenizer.encode("la crème!"), True) == "la crème!"


def test_galactica(tmp_path):
    tokenizer = OPTTokenizer.from_pretrained(galactica(tmp_path / "g"))
    assert not tokenizer.add_bos
    named = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    assert named == (0, 1, 2)
    assert tokenizer.encode("") == []
    text = "I like 1234 dogs, and the lazy fox"  # longer than the file's truncation and padding
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("1234")) == 4
    tokenizer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.json").exists()  # it could not say how digits split
    assert OPTTokenizer.from_pretrained(tmp_path / "saved").encode(text) == tokenizer.encode(text)


def test_tokenizer_json_decides_on_bos_unless_the_config_does(tmp_path):
    backend = trained()
    backend.add_special_tokens(["</s>", "<pad>"])
    backend.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    backend.save(str(tmp_path / "tokenizer.json"))
    found = OPTTokenizer.from_pretrained(tmp_path)
    assert found.encode("") == [2]
    assert found.bos_token_id == 2
    write_config(tmp_path, {"add_bos_token": False})
    assert OPTTokenizer.from_pretrained(tmp_path).encode("") == []
    write_config(tmp_path, OPT_CONFIG)
    assert OPTTokenizer.from_pretrained(tmp_path).encode("") == [2]  # once
    write_config(tmp_path, {"bos_token": "<s>"})
    with pytest.raises(TokenizerError, match="start with '</s>', but bos_token is '<s>'"):
        OPTTokenizer.from_pretrained(tmp_path)
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="at most one token before the text"):
        OPTTokenizer.from_pretrained(tmp_path)


def test_no_pad_token(tmp_path):
    backend = trained()
    contents = json.loads(backend.to_str())
    contents["model"]["vocab"]["[none]"] = contents["model"]["vocab"].pop("<pad>")
    contents["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    tokenizer = OPTTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id is None
    assert tokenizer(["a", "b"], padding_side="left").input_ids.shape == (2, 1)
    keywords: list[dict[str, Any]] = [{"padding": True}, {"padding_side": "left"}]
    for options in keywords:
        with pytest.raises(ValueError, match="need a pad_token"):
            tokenizer(["a", "I like you"], **options)
    with pytest.raises(ValueError, match="need a pad_token"):
        np.asarray(tokenizer(["a", "I like you"]).input_ids)


def test_bytes_the_vocabulary_lacks_are_not_dropped(tmp_path):
    tokenizer = OPTTokenizer.from_pretrained(write_opt_folder(tmp_path / "few", alphabet=False))
    assert tokenizer.decode(tokenizer.encode("Hello"), True) == "Hello"
    assert tokenizer.encode("</s>Hello")[:2] == [2, 2]  # a token, whatever its letters
    with pytest.raises(TokenizerError, match="no token for its byte 0xc3"):
        tokenizer.encode("Helló")


def test_special_tokens_of_names_of_their_own(copy, tmp_path):
    """As multimodal models have them; list and mapping may stand beside each other."""
    tokenizer = OPTTokenizer.from_pretrained(
        copy,
        extra_special_tokens={"image_token": "<image>"},
        additional_special_tokens=["<turn>"],
    )
    count = tokenizer.vocab_size
    assert (tokenizer.image_token, tokenizer.image_token_id) == ("<image>", count)
    assert tokenizer.special_tokens_map["image_token"] == "<image>"
    assert tokenizer.all_special_tokens[-2:] == ["<image>", "<turn>"]
    assert tokenizer.is_special(count)
    tokenizer.save_pretrained(tmp_path)
    again = OPTTokenizer.from_pretrained(tmp_path)
    assert (again.image_token, again.additional_special_tokens) == ("<image>", ["<turn>"])
    with pytest.raises(AttributeError, match="no attribute 'audio_token'"):
        _ = again.audio_token
    with pytest.raises(AttributeError):
        _ = again.audio_token_id


def test_extra_special_tokens(copy):
    count = OPTTokenizer.from_pretrained(copy).vocab_size
    extra = {"extra_special_tokens": ["<turn>"], "mask_token": "<unk>"}
    write_config(copy, OPT_CONFIG | extra)
    (copy / "added_tokens.json").write_text(json.dumps({"<turn>": count}))
    tokenizer = OPTTokenizer.from_pretrained(copy)
    assert tokenizer.encode("<turn><unk>") == [2, count, 3]
    assert tokenizer.is_special(count)
    assert tokenizer.is_special(3)
