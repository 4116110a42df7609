"""Rarer methods of `transformers`' tokenizers, and of what they return."""

import copy
from typing import Any

import numpy as np
import pytest

from opt_core import OPTTokenizer
from opt_core.compatibility.tokenizer_extras import REFUSED
from opt_core.errors import TokenizerError

TEXT = "Hello, my dog is a little cute"


@pytest.fixture(scope="module")
def tokenizer() -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(pretrained_model_name_or_path="mini")


def test_words_tokens_and_characters_lead_to_one_another(tokenizer):
    made = tokenizer([TEXT, "one two"])
    span = made.word_to_tokens(1, 1)
    assert span is not None
    ids = made["input_ids"][1][span.start : span.end]
    assert tokenizer.decode(ids) == " two"
    start, end = made.word_to_chars(1, 1)
    assert "one two"[start:end] == " two"
    assert made.char_to_word(1, 5) == made.token_to_word(1, span.start) == 1
    assert made.token_to_word(0) is None  # the beginning-of-text token
    assert made.token_to_sequence(0, 1) == 0
    assert made.token_to_chars(1, span.start).start == start
    assert made.words(1) == made.word_ids(1)


def test_ids_are_laid_out_as_a_call_lays_texts_out(tokenizer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    made = tokenizer.prepare_for_model(
        ids, max_length=5, truncation=True, padding="max_length", return_special_tokens_mask=True
    )
    assert made["input_ids"] == tokenizer(TEXT, max_length=5, truncation=True)["input_ids"]
    assert made["special_tokens_mask"] == [1, 0, 0, 0, 0]
    assert tokenizer.prepare_for_model([7], padding="max_length", max_length=3)["input_ids"] == [
        tokenizer.bos_token_id, 7, tokenizer.pad_token_id,
    ]  # fmt: skip
    assert tokenizer.truncate_sequences([1, 2, 3, 4], num_tokens_to_remove=2, stride=1) == (
        [1, 2], None, [2, 3, 4],
    )  # fmt: skip
    pair = tokenizer.truncate_sequences([1, 2, 3], [4, 5, 6, 7], num_tokens_to_remove=3)
    assert pair == ([1, 2], [4, 5], [])
    with pytest.raises(TokenizerError, match="4 tokens cannot be cut off a text of 2"):
        tokenizer.truncate_sequences([1, 2], num_tokens_to_remove=4)


def test_special_tokens_in_a_text_may_be_text(tokenizer):
    whole, split = (tokenizer("</s>a", split_special_tokens=flag)["input_ids"] for flag in (0, 1))
    assert len(split) > len(whole)
    assert tokenizer.decode(split, skip_special_tokens=True) == "</s>a"
    assert tokenizer("</s>a")["input_ids"] == whole


def test_rows_get_a_batch_axis(tokenizer):
    made = tokenizer(TEXT).convert_to_tensors("np", prepend_batch_axis=True)
    assert (
        made["input_ids"].shape == made["attention_mask"].shape == (1, len(tokenizer.encode(TEXT)))
    )


def test_conversations(tokenizer):
    template = "{% for m in messages %}{{ m['content'] }}.{% endfor %}{{ tools }}"
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    options = {"chat_template": template, "tokenize": False}
    assert tokenizer.apply_chat_template(talk, tools="T", **options) == "hi.yo.T"
    assert tokenizer.apply_chat_template([talk, talk[:1]], tools="", **options) == ["hi.yo.", "hi."]
    assert tokenizer.apply_chat_template(talk, continue_final_message=True, **options) == "hi.yo"
    named: Any = OPTTokenizer.from_pretrained("mini")
    named.chat_template = {"default": "D", "rag": "R"}
    assert named.get_chat_template() == "D"
    assert named.apply_chat_template(talk, chat_template="rag", tokenize=False) == "R"


def test_files_have_a_prefix(tokenizer, tmp_path):
    files = tokenizer.save_pretrained(save_directory=tmp_path, filename_prefix="mine")
    assert {path.name for path in tmp_path.iterdir()} == {file.rpartition("/")[2] for file in files}
    assert all(path.name.startswith("mine-") for path in tmp_path.iterdir())


def test_settings_are_read(tokenizer):
    assert tokenizer.init_kwargs["pad_token"] == tokenizer.pad_token
    assert not tokenizer.add_eos_token
    assert OPTTokenizer.from_pretrained("mini", add_eos_token=False).sanitize_special_tokens() == 0
    with pytest.raises(TokenizerError, match="add_eos_token: texts end as they are"):
        OPTTokenizer.from_pretrained("mini", add_eos_token=True)
    with tokenizer.as_target_tokenizer():
        assert tokenizer.encode(TEXT)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_to_do(tokenizer, name):
    with pytest.raises(TokenizerError, match=rf"{name} is not supported: \w+"):
        getattr(tokenizer, name)("text")


def test_what_means_nothing_is_named_in_a_warning(tokenizer):
    with pytest.warns(UserWarning, match="truncate=True: no argument of a tokenizer, without eff"):
        assert tokenizer(TEXT, truncate=True) == tokenizer(TEXT)
    with pytest.warns(UserWarning, match="colour='red': no setting of a tokenizer, without effect"):
        made = OPTTokenizer.from_pretrained("mini", colour="red", do_lower_case=True)
    assert made("Ab") == OPTTokenizer.from_pretrained("mini")("Ab")
    with pytest.raises(TokenizerError, match=r"eos_tokens: no setting .* did you mean 'eos_token'"):
        OPTTokenizer.from_pretrained("mini", eos_tokens="x")
    length = len(tokenizer(TEXT).input_ids) + 3
    padded = tokenizer(TEXT, max_length=length, pad_to_max_length=True)
    assert padded == tokenizer(TEXT, max_length=length, padding="max_length")


def test_padding_gives_back_the_tensors_it_was_given(tokenizer):
    rows = [[5, 6, 7], [5]]
    expected = tokenizer.pad({"input_ids": rows}).input_ids
    for given in (
        [{"input_ids": np.array(row)} for row in rows],
        {"input_ids": [np.array(row) for row in rows]},
    ):
        found = tokenizer.pad(given).input_ids
        assert isinstance(found, np.ndarray)
        assert found.tolist() == expected
    assert isinstance(tokenizer.pad([{"input_ids": row} for row in rows]).input_ids, list)


def test_pairs_of_words_and_ids_of_additional_tokens(tokenizer):
    words = ["some", "words"]
    pair = tokenizer(words, words, is_split_into_words=True)
    both = tokenizer([(words, words)] * 2, is_split_into_words=True)
    assert both.input_ids == [pair.input_ids] * 2
    copied = copy.deepcopy(tokenizer)
    copied.additional_special_tokens_ids = [7]
    assert copied.additional_special_tokens == [copied.convert_ids_to_tokens(7)]
    with pytest.raises(TokenizerError, match="additional_special_tokens_ids: no token has one of"):
        copied.additional_special_tokens_ids = [10**6]
    assert tokenizer.encoder["t"] == tokenizer.convert_tokens_to_ids("t")


def test_templates_have_what_transformers_gives_them(tokenizer):
    messages = [{"role": "user", "content": "h<é"}, {"role": "user", "content": "no more"}]

    def text(template: str) -> str:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)

    loop = "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}"
    assert text(loop) == "h<é"
    assert text("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "h<é"
    assert text("{{ messages[0] | tojson }}") == '{"role": "user", "content": "h<é"}'
    assert text("{{ strftime_now('%Y') }}").isdigit()
    jinja2 = pytest.importorskip("jinja2")
    with pytest.raises(jinja2.TemplateError, match="roles must alternate"):
        text("{{ raise_exception('roles must alternate') }}")
