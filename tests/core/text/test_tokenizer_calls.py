"""The tokenizer called as `transformers`' is: the same lists, attributes and methods, live."""

import json
import pickle
import re
import shutil
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_core import OPTConfig, OPTTokenizer, TrainConfig
from opt_core.data import LabelledTexts, encode_labelled_texts, open_data
from opt_core.errors import TokenizerError
from opt_core.text.adapter import as_tokenizer
from opt_core.text.detokenizer import Detokenizer, StopStringTracker
from tests.support.small_tokenizer import TEXT, trained, write_opt_folder

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

SHORT, LONG = "Hello", "I like your dog, and the world; ünï 日本 👍🏽"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_opt_folder(tmp_path_factory.mktemp("opt"))


@pytest.fixture
def ours(folder):
    return OPTTokenizer.from_pretrained(folder)


@pytest.fixture
def theirs(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def plain(values: Any) -> Any:
    """An encoding as an ordinary dictionary of ordinary lists."""
    return {k: np.asarray(v).tolist() if hasattr(v, "dtype") else v for k, v in values.items()}


EVERYTHING = {
    "return_offsets_mapping": True,
    "return_special_tokens_mask": True,
    "return_token_type_ids": True,
    "return_length": True,
}
CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((SHORT,), {}),
    (([SHORT, LONG],), {}),
    (([SHORT],), {"return_tensors": "np"}),
    ((LONG,), {"return_tensors": "np"}),
    ((SHORT, LONG), EVERYTHING),
    (([SHORT, LONG], [LONG, SHORT]), {"padding": True, **EVERYTHING}),
    (([(SHORT, LONG), (LONG, SHORT)],), {"padding": "longest", "padding_side": "left"}),
    (([SHORT, LONG],), {"padding": True, "return_tensors": "np", **EVERYTHING}),
    (([SHORT, LONG],), {"padding": "max_length", "max_length": 50}),
    (([SHORT, LONG],), {"padding": "max_length", "max_length": 7, "truncation": True}),
    (([SHORT, LONG],), {"padding": "max_length", "max_length": 8}),
    (([SHORT, LONG],), {"padding": True, "pad_to_multiple_of": 8, "padding_side": "left"}),
    (([SHORT, LONG],), {"padding": False, "add_special_tokens": False}),
    (([SHORT, LONG],), {"max_length": 4}),
    (([SHORT, LONG],), {"truncation": True, "max_length": 4, "return_attention_mask": False}),
    (([SHORT, LONG],), {"truncation": "do_not_truncate", "padding": "do_not_pad"}),
    ((LONG, SHORT), {"truncation": "only_first", "max_length": 9, **EVERYTHING}),
    ((SHORT, LONG), {"truncation": "only_second", "max_length": 9, **EVERYTHING}),
    ((LONG, LONG), {"truncation": "longest_first", "max_length": 11, **EVERYTHING}),
    ((LONG, SHORT), {"truncation": True, "max_length": 11, **EVERYTHING}),
    (
        ([SHORT, LONG],),
        {"truncation": True, "max_length": 8, "stride": 3, "return_overflowing_tokens": True}
        | EVERYTHING,
    ),
    (
        ([SHORT] * 2, [LONG, SHORT]),
        {
            "truncation": "only_second",
            "max_length": 12,
            "stride": 2,
            "return_overflowing_tokens": True,
            "padding": "max_length",
            "return_offsets_mapping": True,
        },
    ),
    ((SHORT,), {"truncation": True, "max_length": 8, "return_overflowing_tokens": True}),
    ((["I", "like"],), {"is_split_into_words": True}),
    (([["I", "like"], ["dogs"]],), {"is_split_into_words": True, "padding": True}),
    (("",), {}),
]


@pytest.mark.parametrize(("texts", "options"), CALLS, ids=lambda x: "")
@pytest.mark.parametrize("cut", ["left", "right"])
def test_calls(ours, theirs, texts, options, cut):
    ours.truncation_side = theirs.truncation_side = cut
    expected, made = theirs(*texts, **options), ours(*texts, **options)
    assert plain(made) == plain(expected)
    assert made.keys() == expected.keys()
    assert {k: type(v).__name__ for k, v in made.items() if isinstance(v, np.ndarray)} == {
        k: type(v).__name__ for k, v in expected.items() if isinstance(v, np.ndarray)
    }
    assert made.tokens() == expected.tokens()
    assert made.word_ids() == expected.word_ids()
    assert made.sequence_ids() == expected.sequence_ids()


@settings(max_examples=150, deadline=None)
@given(
    first=st.text("ab </s><pad>.,'\n1é😀I like", max_size=30),
    second=st.none() | st.text("ab </s>.é😀dog", min_size=1, max_size=30),
    length=st.integers(6, 20),
    side=st.sampled_from(["left", "right"]),
)
def test_any_texts(pair_of_tokenizers, first, second, length, side):
    ours, theirs = pair_of_tokenizers
    options = {"truncation": True, "max_length": length, "padding": "max_length", **EVERYTHING}
    expected = theirs(first, second, padding_side=side, **options)
    assert dict(ours(first, second, padding_side=side, **options)) == dict(expected)


@pytest.fixture(scope="module")
def pair_of_tokenizers(folder):
    kinds = OPTTokenizer, transformers.AutoTokenizer
    return tuple(kind.from_pretrained(folder) for kind in kinds)


def test_methods(ours, theirs):
    ids = theirs(LONG).input_ids
    tokens = theirs.convert_ids_to_tokens(ids)
    assert ours.tokenize(LONG) == theirs.tokenize(LONG)
    assert ours.tokenize(LONG, add_special_tokens=True) == tokens
    assert ours.convert_ids_to_tokens(ids) == tokens
    for one in (ids[1], np.int32(ids[1]), np.array(ids)[1]):
        assert ours.convert_ids_to_tokens(one) == tokens[1]
    assert ours.convert_ids_to_tokens(ids, skip_special_tokens=True) == tokens[1:]
    assert ours.convert_tokens_to_ids(tokens) == ids
    for token in ("</s>", "no such token", ["Hello", "no such token"]):
        assert ours.convert_tokens_to_ids(token) == theirs.convert_tokens_to_ids(token)
    assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)
    assert ours.get_vocab() == ours.vocab == theirs.get_vocab()
    assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size)
    for text in (LONG, "a </s> b"):
        row = ours.encode(text)
        assert row == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(row, skip_special_tokens=skip) == theirs.decode(
                row, skip_special_tokens=skip
            )
    assert ours.batch_decode([ids, ids[:3]]) == theirs.batch_decode([ids, ids[:3]])
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.encode(SHORT, LONG) == theirs.encode(SHORT, LONG)
    assert ours.encode(SHORT, return_tensors="np").tolist() == [theirs.encode(SHORT)]
    assert ours.encode_plus(SHORT) == ours(SHORT)
    assert ours.batch_encode_plus([SHORT, LONG]) == ours([SHORT, LONG])
    assert ours.batch_encode_plus([(SHORT, LONG)]) == ours([SHORT], [LONG])
    for pair in (False, True):
        assert ours.num_special_tokens_to_add(pair) == theirs.num_special_tokens_to_add(pair)
    assert ours.get_special_tokens_mask(ids, already_has_special_tokens=True) == (
        theirs.get_special_tokens_mask(ids, already_has_special_tokens=True)
    )
    bare = [ours.encode(text, add_special_tokens=False) for text in (SHORT, LONG)]
    assert ours.build_inputs_with_special_tokens(*bare) == ours.encode(SHORT, LONG)
    assert ours.get_special_tokens_mask(*bare) == (
        ours(SHORT, LONG, return_special_tokens_mask=True).special_tokens_mask
    )
    assert {*ours.create_token_type_ids_from_sequences(*bare)} == {0}
    assert ours.clean_up_tokenization("a , b ! isn 't 's") == "a, b! isn 't's"
    assert ours.decode(ours.encode("a . b", add_special_tokens=False)) == "a . b"
    row = ours.encode("a . b", add_special_tokens=False)
    assert ours.decode(row, clean_up_tokenization_spaces=True) == "a. b"


ATTRIBUTES = """
    bos_token eos_token unk_token pad_token sep_token cls_token mask_token bos_token_id
    eos_token_id unk_token_id pad_token_id mask_token_id all_special_ids all_special_tokens
    special_tokens_map padding_side truncation_side model_max_length name_or_path is_fast
    add_bos_token model_input_names added_tokens_encoder pad_token_type_id
    max_len_single_sentence clean_up_tokenization_spaces chat_template
""".split()  # noqa: SIM905


def same_attributes(ours: Any, theirs: Any) -> None:
    for name in ATTRIBUTES:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_attributes_can_be_set(ours, theirs):
    same_attributes(ours, theirs)
    for tokenizer in (ours, theirs):
        tokenizer.padding_side = tokenizer.truncation_side = "left"
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer.model_max_length = 6
    same_attributes(ours, theirs)
    options = {"padding": True, "truncation": True}
    assert dict(ours([SHORT, LONG], **options)) == dict(theirs([SHORT, LONG], **options))
    for tokenizer in (ours, theirs):
        tokenizer.pad_token_id = 5
    same_attributes(ours, theirs)
    ours.pad_token = theirs.pad_token = None
    assert ours.pad_token_id is theirs.pad_token_id is None
    for tokenizer in (ours, theirs):
        with pytest.raises(ValueError, match="pad_token"):
            tokenizer([SHORT, LONG], padding=True)
    ours.add_bos_token = False
    assert ours(SHORT).input_ids == ours.encode(SHORT, add_special_tokens=False)
    ours.bos_token = None
    assert ours.encode(SHORT) == ours.encode(SHORT, add_special_tokens=False)
    with pytest.raises(TokenizerError, match="padding_side"):
        ours.padding_side = "middle"
    with pytest.raises(TokenizerError, match="no token has id"):
        ours.pad_token_id = 10**6


def test_added_tokens(ours, theirs, tmp_path):
    added = {"pad_token": "[PAD]", "additional_special_tokens": ["<turn>"]}
    for tokenizer in (ours, theirs):
        assert tokenizer.add_special_tokens(added) == 2
        assert tokenizer.add_tokens(["plain word", "[PAD]x"]) == 2
        assert tokenizer.add_tokens("again") == 1
    text = "a plain word<turn>[PAD]x</s>again"
    ids = ours.encode(text)
    assert ids == theirs(text).input_ids
    assert len(ours) == len(theirs) == ours.vocab_size + 5
    assert ours.additional_special_tokens == ["<turn>"]
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert ours.pad_token_id == theirs.pad_token_id == ours.vocab_size
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    ours.padding_side, ours.model_max_length = "left", 77
    ours.save_pretrained(tmp_path)
    for read in (OPTTokenizer, transformers.AutoTokenizer):
        again = read.from_pretrained(tmp_path)
        assert again(text).input_ids == ids
        assert (again.pad_token, again.padding_side) == ("[PAD]", "left")
        assert again.model_max_length == 77
    assert OPTTokenizer.from_pretrained(tmp_path).additional_special_tokens == ["<turn>"]
    with pytest.raises(TokenizerError, match="no special token; expected one of bos_token"):
        ours.add_special_tokens({"beginning": "x"})


def test_settings_of_from_pretrained(folder):
    options = {"padding_side": "left", "pad_token": "[PAD]", "bos_token": "[B]"}
    harmless = {"use_fast": True, "trust_remote_code": False, "cache_dir": None, "revision": None}
    ours = OPTTokenizer.from_pretrained(folder, add_bos_token=True, **options, **harmless)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, add_bos_token=True, **options)
    assert dict(ours([SHORT, LONG], padding=True)) == dict(theirs([SHORT, LONG], padding=True))
    strange = OPTTokenizer.from_pretrained(folder, bos_token="$$$", add_bos_token=True)
    assert strange.decode(strange(SHORT).input_ids) == f"$$${SHORT}"
    with pytest.raises(TokenizerError, match="paddingside: no setting of a tokenizer"):
        OPTTokenizer.from_pretrained(folder, paddingside="left")


def test_no_special_token_of_a_vocabulary_without_any():
    """GPT-2's test vocabulary has no padding token: it is read, and padding is refused."""
    tokens = [*"lowerstidn", "Ġ", "Ġl", "Ġn", "Ġlo", "Ġlow", "er"]  # "e" and "r" once
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    vocabulary |= {"Ġlowest": 16, "Ġnewer": 17, "Ġwider": 18, "<unk>": 19, "<|endoftext|>": 20}
    merges = ["Ġ l", "Ġl o", "Ġlo w", "e r"]
    ours = OPTTokenizer(vocabulary, merges, unk_token="<unk>")
    theirs = transformers.GPT2Tokenizer(vocabulary, [tuple(m.split()) for m in merges])
    assert ours.tokenize(" lower newer") == ["Ġlow", "er", "Ġ", "n", "e", "w", "er"]
    assert ours(" lower newer").input_ids == theirs(" lower newer").input_ids
    assert (ours.bos_token, ours.eos_token_id, ours.pad_token) == ("<|endoftext|>", 20, None)
    assert ours.tokenize("lower", add_prefix_space=True) == ["Ġlow", "er"]
    made = ours("lower", add_prefix_space=True, return_offsets_mapping=True)
    assert (made.input_ids, made.offset_mapping) == ([14, 15], [(0, 3), (3, 5)])
    assert not ours.add_prefix_space
    ours.add_prefix_space = True
    assert ours.encode("lower") == [14, 15]
    ours.add_prefix_space = False
    assert ours.convert_tokens_to_ids([*ours.tokenize(" lower"), "<unk>"]) == [14, 15, 19]
    keywords: list[dict[str, Any]] = [
        {"padding": True}, {"padding": "max_length", "max_length": 15},
    ]  # fmt: skip
    for options in keywords:
        with pytest.raises(ValueError, match="need a pad_token"):
            ours([" lower", " lower newer"], **options)
    named = OPTTokenizer(vocabulary=vocabulary, merges=merges, pad_token="<pad>")
    assert named.pad_token_id == 21
    assert named([" low", " lower"], padding=True).input_ids == [[14, 21], [14, 15]]


def test_lists_that_are_arrays_where_one_is_wanted(ours):
    made = ours([SHORT, LONG])
    assert [type(row) for row in made.input_ids] == [list, list]
    alone = [ours(text).input_ids for text in (SHORT, LONG)]
    assert made["input_ids"] == alone
    padded = ours([SHORT, LONG], padding_side="right")
    for name in ("input_ids", "attention_mask"):
        array = np.asarray(made[name])
        assert array.dtype == padded[name].dtype == np.int32
        np.testing.assert_array_equal(array, padded[name])
        assert made[name].shape == array.shape
    assert made.input_ids[0, 1] == alone[0][1]
    ours.padding_side = "left"
    assert ours([SHORT, LONG]).input_ids[0, 0] == ours.pad_token_id
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    assert again.input_ids.shape == made.input_ids.shape
    with pytest.raises(ValueError, match="no tensor; pass padding=True"):
        ours([SHORT, LONG], return_tensors="np")
    assert {**made}.keys() == {*made} == {"input_ids", "attention_mask"}
    assert made.to("cpu") is made
    assert made.data == dict(made.items())
    assert made[1].ids == alone[1]
    assert made.char_to_token(1, 0) == 1
    assert made.token_to_chars(1, 1) == (0, 1)
    assert "input_ids" in made.copy()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_tensors": "mx"}, "return_tensors: expected one of 'np', 'pt', 'tf', 'jax'"),
        ({"padding": "most"}, "padding: expected one of"),
        ({"truncation": "all"}, "truncation: expected one of"),
        ({"max_length": 0}, "max_length: expected at least 1"),
        ({"max_length": 2.5}, "max_length: expected at least 1"),
        ({"truncation": True, "max_length": 4, "stride": 3}, "expected more than stride=3"),
        ({"truncation": True, "max_length": 4, "stride": -1}, "stride: expected at least 0"),
        ({"truncation": "only_second", "max_length": 2}, "text 0: cannot be cut"),
        ({"text_target": "x"}, "text_target: a causal language model"),
        (
            {"return_tensor": "np"},
            "return_tensor: no argument of a tokenizer; did you mean",
        ),
        (
            {"padding": True, "truncation": True, "max_length": 12, "pad_to_multiple_of": 8},
            "pad_to_multiple_of=8: rows are cut to max_length=12, which is no multiple",
        ),
    ],
)
def test_arguments_that_cannot_be_honoured(ours, options, message):
    with pytest.raises(TokenizerError, match=re.escape(message)) as caught:
        ours([LONG], **options)
    assert "\n" not in str(caught.value)


def test_what_is_refused_says_what_to_use(ours, tmp_path):
    for call in (
        lambda: ours.push_to_hub("me/mine"),
        lambda: ours.save_pretrained(tmp_path, push_to_hub=True),
    ):
        with pytest.raises(TokenizerError, match="upload_folder"):
            call()
    with pytest.raises(TokenizerError, match="has no chat_template"):
        ours.apply_chat_template([{"role": "user", "content": "x"}])
    with pytest.raises(TokenizerError, match="needs vocab= and merges="):
        OPTTokenizer()


def test_chat_template(ours, theirs):
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    )
    ours.chat_template = theirs.chat_template = template
    talk = [{"role": "user", "content": "Hello"}, {"role": "dog", "content": "like"}]
    assert ours.apply_chat_template(talk, tokenize=False) == theirs.apply_chat_template(
        talk, tokenize=False
    )
    assert ours.apply_chat_template(talk) == theirs.apply_chat_template(talk, return_dict=False)


def test_training_a_new_one(ours, theirs):
    made = ours.train_new_from_iterator([TEXT], 300, new_special_tokens=["<x>"])
    expected = theirs.train_new_from_iterator([TEXT], 300, new_special_tokens=["<x>"])
    assert made.get_vocab() == expected.get_vocab()
    assert made(LONG).input_ids == expected(LONG).input_ids
    assert (made.pad_token, made.bos_token, made.add_bos_token) == ("<pad>", "</s>", True)


def test_pad(ours, theirs):
    rows = [{"input_ids": ours.encode(text), "labels": 1} for text in (SHORT, LONG)]
    for options in (
        {},
        {"padding_side": "left", "pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 40, "return_tensors": "np"},
    ):
        assert plain(ours.pad(rows, **options)) == plain(theirs.pad(rows, **options))
    batch = ours([SHORT, LONG])
    assert plain(ours.pad(batch)) == plain(theirs.pad(theirs([SHORT, LONG])))
    one = {"input_ids": [2, 5]}
    options = {"padding": "max_length", "max_length": 3}
    assert plain(ours.pad(one, **options)) == plain(theirs.pad(one, **options))
    with pytest.raises(TokenizerError, match="expected rows with input_ids, received labels"):
        ours.pad([{"labels": 1}])


def test_collators_of_transformers(ours, theirs):
    pytest.importorskip("torch")
    rows = [ours(text) for text in (SHORT, LONG)]
    for kind in (
        lambda t: transformers.DataCollatorForLanguageModeling(t, mlm=False),
        lambda t: transformers.DataCollatorWithPadding(t, pad_to_multiple_of=4),
    ):
        expected = kind(theirs)([dict(row) for row in rows])
        assert plain(kind(ours)(rows)) == plain(expected)
        assert {str(v.dtype) for v in kind(ours)(rows).values()} == {"torch.int64"}


def test_torch_tensors(ours):
    torch = pytest.importorskip("torch")
    made = ours([SHORT, LONG], padding=True, return_tensors="pt").to("cpu")
    assert made.input_ids.dtype == torch.int64
    assert made.input_ids.tolist() == ours([SHORT, LONG], padding=True).input_ids
    assert ours(SHORT, return_tensors="pt").input_ids.shape[0] == 1
    assert ours.batch_decode(made.input_ids, skip_special_tokens=True) == [SHORT, LONG]
    assert ours.decode(made.input_ids[0, 0]) == "</s>"
    streamer = transformers.TextStreamer(ours, skip_prompt=False)
    streamer.put(made.input_ids[1])
    streamer.end()


def test_tokenizers_of_transformers_are_taken(ours, theirs):
    made = as_tokenizer(theirs)
    assert as_tokenizer(theirs) is made
    assert as_tokenizer(ours) is ours
    assert made(LONG).input_ids == theirs(LONG).input_ids
    assert made.get_vocab() == theirs.get_vocab()
    assert (made.add_bos, made.pad_token_id, made.eos_token_id) == (True, 1, 2)
    theirs([SHORT, LONG], padding="max_length", truncation=True, max_length=3)
    theirs.add_tokens(["new one"])
    theirs.pad_token, theirs.padding_side = "</s>", "left"
    again = as_tokenizer(theirs)
    assert again.encode(f"{LONG} new one") == theirs(f"{LONG} new one").input_ids
    assert (again.pad_token_id, again.padding_side) == (2, "left")
    tracker, row = StopStringTracker(theirs, "dog"), Detokenizer(theirs)
    ids = theirs(LONG).input_ids
    assert any(map(tracker.push, ids))
    assert "".join([*map(row.push, ids), row.flush()]) == LONG
    with pytest.raises(TokenizerError, match="expected an OPTTokenizer, or one of transformers'"):
        as_tokenizer("facebook/opt-125m")


def test_they_prepare_data(ours, theirs, tmp_path):
    text, model = tmp_path / "text.txt", OPTConfig(vocab_size=320, max_position_embeddings=32)
    text.write_text("\n".join(f"{i} {LONG[i:]} {i * i}" for i in range(9)))
    config = TrainConfig(sequence_length=16)
    labelled = LabelledTexts([SHORT, LONG], None, [0, 1], ("a", "b"))
    found = []
    for tokenizer, run in ((ours, tmp_path / "a"), (theirs, tmp_path / "b")):
        data = open_data(text, "text", model, config, tokenizer=tokenizer, folder=run)
        rows = encode_labelled_texts(labelled, tokenizer, 16)
        found.append([row.tolist() for row in [*data.train, *(r["input_ids"] for r in rows)]])
    assert found[0] == found[1]


def test_slow_tokenizers_of_transformers_4_are_taken(ours):
    """Those have no library underneath: their files say what they are."""

    class Slow:
        padding_side = truncation_side = "right"
        bos_token = eos_token = unk_token = "</s>"
        pad_token, sep_token, cls_token, mask_token = "<pad>", None, None, None

        def __len__(self):
            return len(ours)

        def decode(self, ids):
            return ""

        def save_pretrained(self, folder):
            ours.save_pretrained(folder)

    assert as_tokenizer(Slow()).encode(LONG) == ours.encode(LONG)


def test_made_of_parts(ours, folder, tmp_path):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    merges = (folder / "merges.txt").read_text().split("\n")[1:-1]
    for made in (
        OPTTokenizer(folder / "vocab.json", folder / "merges.txt"),
        OPTTokenizer(vocab_file=str(folder / "vocab.json"), merges_file=str(folder / "merges.txt")),
        OPTTokenizer(vocabulary=vocabulary, merges=merges),
        OPTTokenizer(vocab=vocabulary, merges=[tuple(merge.split()) for merge in merges]),
    ):
        assert made.encode(LONG) == ours.encode(LONG)
    assets = tmp_path / "assets" / "tokenizer"  # as KerasHub lays them out
    assets.mkdir(parents=True)
    shutil.copyfile(folder / "vocab.json", assets / "vocabulary.json")
    shutil.copyfile(folder / "merges.txt", assets / "merges.txt")
    for preset in (tmp_path, folder):
        assert OPTTokenizer.from_preset(preset).encode(LONG) == ours.encode(LONG)
    assert OPTTokenizer(*ours.save_vocabulary(tmp_path, "mine")).encode(LONG) == ours.encode(LONG)
    backend = trained()
    assert OPTTokenizer(tokenizer_object=backend).encode(LONG) == backend.encode(LONG).ids
    assert ours.detokenize(ours.encode(SHORT)) == f"</s>{SHORT}"
    assert ours.vocabulary_size() == len(ours.get_vocabulary()) == len(ours)
    assert ours.id_to_token(ours.token_to_id("<pad>")) == "<pad>"


def test_repr_is_a_line(ours):
    assert re.fullmatch(
        r"OPTTokenizer\('.*', 320 tokens, bos_token='</s>', .*, padding_side='right'\)", repr(ours)
    )
