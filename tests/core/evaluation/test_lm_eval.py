"""The adapter for `lm-eval`, on a model whose every answer is known."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from opt_core import OPTTokenizer
from opt_core.errors import DataError, InputError
from tests.support.lm_eval_stand_in import install, request
from tests.support.small_tokenizer import write_opt_folder

TEXT = "The quick brown fox jumps over the lazy dog; the dog sleeps. "


class Bigrams:
    """A language model that looks at one token, and remembers the shapes it was given."""

    def __init__(self, vocabulary: int) -> None:
        logits = np.random.default_rng(0).normal(size=(vocabulary, vocabulary)) * 3
        self.table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        self.shapes: list[tuple[int, ...]] = []
        self.asked: list[dict[str, Any]] = []

    def token_scores(self, ids: Any) -> tuple[Any, Any]:
        self.shapes.append(ids.shape)
        rows = self.table[ids[:, :-1]]
        picked = np.take_along_axis(rows, ids[:, 1:, None], -1)[..., 0]
        return picked.astype(np.float32), rows.argmax(-1) == ids[:, 1:]

    def follow(self, ids: list[int], count: int) -> list[int]:
        """The greedy continuation."""
        for _ in range(count):
            ids = [*ids, int(self.table[ids[-1]].argmax())]
        return ids[-count:]

    def generate(self, ids: Any, attention_mask: Any, **settings: Any) -> Any:
        self.asked.append({"shape": ids.shape, **settings})
        assert (np.diff(attention_mask, axis=1) >= 0).all(), "padding is on the left"
        new = [self.follow([*row], settings["max_new_tokens"]) for row in ids.tolist()]
        return np.concatenate([ids, np.array(new, ids.dtype)], axis=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(write_opt_folder(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def model(tokenizer: OPTTokenizer) -> Bigrams:
    return Bigrams(tokenizer.vocab_size)


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch, model: Bigrams, tokenizer: OPTTokenizer) -> Any:
    install(monkeypatch)
    from opt_core.evaluation.lm_eval import HarnessLM

    return HarnessLM(model.token_scores, model.generate, tokenizer, window=16, batch_size=3)


def test_continuations(lm: Any, model: Bigrams, tokenizer: OPTTokenizer):
    pairs = [("The quick", " brown fox"), ("", "I like you."), ("the dog ", "sleeps")]
    found = lm.loglikelihood([request(*pair) for pair in pairs])
    for (context, text), (value, is_greedy) in zip(pairs, found, strict=True):
        ids = tokenizer.encode(context.rstrip() + " " * (context[-1:] == " ") + text)
        count = len(ids) - len(tokenizer.encode(context.rstrip()))
        steps = [model.table[a, b] for a, b in pairwise(ids)][-count:]
        assert value == pytest.approx(sum(steps), rel=1e-5)
        assert not is_greedy
    for a, b in pairwise(tokenizer.encode("I like you.")):
        model.table[a, b] = 9
    assert lm.loglikelihood([request("I like", " you.")])[0][1]
    assert lm.remembered[0] == ("loglikelihood", pairs[0], found[0])
    with pytest.raises(DataError, match="do not fit into a window of 16"):
        lm.loglikelihood([request("", TEXT)])


def test_whole_texts(lm: Any, model: Bigrams, tokenizer: OPTTokenizer):
    """Shorter than a row, as long as one, and of many: every token counts once."""
    texts = ["", "The", TEXT[:20], TEXT * 3, *(TEXT[:n] for n in range(30, 45))]
    found = lm.loglikelihood_rolling([request(text) for text in texts])
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert {15, 16, 17} <= {*lengths}
    assert max(shape[1] for shape in model.shapes) == 16
    for text, value in zip(texts, found, strict=True):
        ids = tokenizer.encode(text)
        steps = [model.table[a, b] for a, b in pairwise(ids)]
        assert value == pytest.approx(sum(steps), rel=1e-5)


def test_the_last_row_reaches_back(lm: Any, tokenizer: OPTTokenizer):
    """Each token scores how many tokens its row has before it."""
    lm._token_scores = lambda ids: 2 * (np.tile(np.arange(1, ids.shape[1]), (len(ids), 1)),)
    count = len(tokenizer.encode(TEXT)) - 1
    assert count > 15
    assert count % 15
    whole, left = divmod(count, 15)
    expected = whole * sum(range(1, 16)) + sum(range(16 - left, 16))
    assert lm.loglikelihood_rolling([request(TEXT)]) == [expected]


def test_texts_are_written(lm: Any, model: Bigrams, tokenizer: OPTTokenizer):
    greedy = {"until": [], "max_gen_toks": 5, "do_sample": False, "temperature": 0.0}
    contexts = ["The", "The quick brown fox", "I like", TEXT]
    found = lm.generate_until([request(text, greedy) for text in contexts])
    for context, text in zip(contexts, found, strict=True):
        assert text == tokenizer.decode(model.follow(tokenizer.encode(context), 5), True)
    assert all(call["shape"][1] <= 16 - 5 for call in model.asked)
    assert sum(call["shape"][0] for call in model.asked) == 4
    assert not any(call["do_sample"] or "temperature" in call for call in model.asked)
    stop = found[0][2:4]
    (cut,) = lm.generate_until([request("The", {**greedy, "until": stop})])
    assert cut == found[0][: found[0].index(stop)]
    assert model.asked[-1]["stop_strings"] == [stop]
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_gen_toks": 2}
    lm.generate_until([request("The", greedy), request("The", sampled)])
    assert [call["do_sample"] for call in model.asked[-2:]] == [False, True]
    assert (model.asked[-1]["temperature"], model.asked[-1]["top_p"]) == (0.7, 0.9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 3}, "settings that are not known: num_beams"),
        ({"max_gen_toks": 16}, "max_gen_toks=16: expected less than the model's 16 positions"),
        ({}, "max_gen_toks=256: expected less"),
    ],
)
def test_settings_that_cannot_be_honoured(lm: Any, settings: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        lm.generate_until([request("The", settings)])
