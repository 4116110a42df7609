"""A tokenizer with a pad token that its model's embedding has no row for."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from opt_core import OPTConfig, OPTTokenizer
from opt_core.errors import TokenizerError
from tests.support.files.checkpoint_fixtures import TINY
from tests.support.small_tokenizer import write_opt_folder

transformers: Any = pytest.importorskip("transformers")
opt_torch: Any = pytest.importorskip("opt_torch")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As scripts leave it that add a [PAD] with `transformers` and do not resize the model."""
    theirs = transformers.AutoTokenizer.from_pretrained(write_opt_folder(tmp_path))
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(tmp_path)
    config = TINY.replace(vocab_size=theirs.convert_tokens_to_ids("[PAD]"))
    opt_torch.OPTForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_padding_is_the_models(folder: Path):
    with pytest.warns(UserWarning, match=r"tokenizer_config\.json: .*'\[PAD\]'.*config\.json"):
        tokenizer = OPTTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token_id, tokenizer.pad_token) == (1, "<pad>")
    model = opt_torch.OPTForCausalLM.from_pretrained(folder)
    encoded = tokenizer(["I like", "I like you"], padding_side="left")
    assert encoded.input_ids[0, 0] == 1
    alone = model.generate(tokenizer(["I like"]).input_ids, max_new_tokens=3)
    batch = model.generate(**encoded, max_new_tokens=3)
    assert batch[0, 1:].tolist() == alone[0].tolist()


def test_who_names_a_token_has_it(folder: Path):
    """As for a model that is resized next."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = OPTTokenizer.from_pretrained(folder, pad_token="[PAD]")
    assert tokenizer.pad_token_id == len(tokenizer) - 1


def test_a_resized_model_has_the_token_itself(folder: Path):
    config = OPTConfig.from_pretrained(folder)
    config.replace(vocab_size=config.vocab_size + 1).save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OPTTokenizer.from_pretrained(folder).pad_token_id == config.vocab_size


def test_both_files_are_named_where_there_is_no_other(folder: Path):
    OPTConfig.from_pretrained(folder).replace(pad_token_id=None).save_pretrained(folder)
    with pytest.raises(TokenizerError) as caught:
        OPTTokenizer.from_pretrained(folder)
    for part in (
        "tokenizer_config.json: pad_token '[PAD]'",
        str(folder / "config.json"),
        "set one",
    ):
        assert part in str(caught.value)
    (folder / "config.json").write_text("{")
    assert OPTTokenizer.from_pretrained(folder).pad_token_id  # the model says what is wrong there
