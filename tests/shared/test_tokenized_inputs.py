"""A tokenizer's results go into models as they are: lists, arrays, tensors, of either library."""

import numpy as np
import pytest

from opt_core.errors import InputError
from opt_core.text.tokenizer import OPTTokenizer
from tests.support.backends import make_backend
from tests.support.files.tiny_folder import save_model

pytestmark = pytest.mark.dealt

TENSORS = {"torch": "pt", "tf": "tf", "flax": "jax"}
TEXTS = ["I like your dog", "Hello"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny"))


def test_lists_arrays_and_tensors_are_the_same_to_a_model(backend, tiny):
    tokenizer, model = OPTTokenizer.from_pretrained(tiny), backend.load(tiny)
    padded = tokenizer(TEXTS, padding_side="right")
    expected = backend.run(model, **padded).logits
    kind = TENSORS[backend.name]
    for batch in (tokenizer(TEXTS), tokenizer(TEXTS, padding=True, return_tensors=kind)):
        np.testing.assert_array_equal(backend.run(model, **batch).logits, expected)
    one = tokenizer(TEXTS[0])
    row = backend.run(model, **one).logits
    assert row.shape == (1, len(one.input_ids), model.config.vocab_size)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    made = backend.generate(model, [one.input_ids], **settings)
    for ids in (one.input_ids, tokenizer(TEXTS[0], return_tensors=kind).input_ids):
        np.testing.assert_array_equal(backend.generate(model, ids, **settings), made)
    np.testing.assert_array_equal(made[0, : len(one.input_ids)], one.input_ids)
    for text in (TEXTS[0], TEXTS):
        with pytest.raises(
            InputError, match=r"received text; a tokenizer makes ids|texts need a tokenizer"
        ):
            backend.generate(model, text, **settings)


def test_tokenizers_of_transformers_know_stop_strings(tiny):
    transformers, backend = pytest.importorskip("transformers"), make_backend("torch")
    ours, model = OPTTokenizer.from_pretrained(tiny), backend.load(tiny)
    theirs = transformers.AutoTokenizer.from_pretrained(tiny)
    prompt = ours("Hello").input_ids
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    free = backend.generate(model, prompt, tokenizer=ours, **settings)[0]
    stop = ours.decode(free[len(prompt) : len(prompt) + 1])
    for tokenizer in (ours, theirs):
        row = backend.generate(model, prompt, tokenizer=tokenizer, stop_strings=stop, **settings)
        assert row.shape == (1, len(prompt) + 1)
