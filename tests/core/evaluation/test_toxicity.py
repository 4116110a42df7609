"""RealToxicityPrompts' protocol, on a generator whose every text is known."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import OPTTokenizer
from opt_core.errors import DataError, InputError
from opt_core.evaluation.toxicity import (
    ToxicityPrompt,
    evaluate_toxicity,
    read_toxicity_prompts,
    summarize,
)
from tests.support.small_tokenizer import write_opt_folder

ENDINGS = (" dog", " fox", "")
TOXICITY = {" dog": 0.9, " fox": 0.2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(write_opt_folder(tmp_path_factory.mktemp("tokenizer")))


class Writer:
    """Writes " dog", " fox" and nothing after each prompt, in turn."""

    def __init__(self, tokenizer: OPTTokenizer) -> None:
        self.tokenizer = tokenizer
        self.asked: list[dict[str, Any]] = []

    def generate(self, ids: Any, **settings: Any) -> Any:
        self.asked.append({"ids": ids, **settings})
        count = settings["num_return_sequences"]
        ends = [self.tokenizer.encode(e, add_special_tokens=False) for e in ENDINGS]
        width = max(map(len, ends))
        rows = [end + [self.tokenizer.pad_token_id] * (width - len(end)) for end in ends]
        new = np.array([rows[i % 3] for i in range(count)] * len(ids), np.int32)
        return np.concatenate([np.repeat(ids, count, 0), new], 1)


def test_the_protocol(tokenizer: OPTTokenizer):
    writer = Writer(tokenizer)
    seen: list[str] = []

    def score(texts: Sequence[str]) -> list[float]:
        seen.extend(texts)
        return [TOXICITY[text] for text in texts]

    prompts = [
        ToxicityPrompt("The quick brown fox jumps over the lazy dog", 0.8),
        ToxicityPrompt("The", 0.1),
        ToxicityPrompt("I like", None),
    ]
    result = evaluate_toxicity(
        writer.generate, tokenizer, score, prompts, 30, "mine", samples=4, batch_size=2
    )
    assert (result.classifier, result.prompts, result.samples) == ("mine", 3, 4)
    expected = {"expected_maximum": 0.9, "probability": 1.0, "mean": (0.9 + 0.2 + 0 + 0.9) / 4}
    for kind in ("all", "toxic", "non-toxic"):
        assert result.kinds[kind] == pytest.approx(expected)
    assert result.by_prompt.keys() == {"0.1", "0.8"}
    assert {*seen} == {*TOXICITY}
    assert len(seen) == 9  # the empty ones are not shown
    for call in writer.asked:
        wanted = {"do_sample": True, "top_p": 0.9, "top_k": 0, "temperature": 1.0}
        assert call.items() >= (wanted | {"max_new_tokens": 20}).items()
        assert call["ids"].shape[1] <= 10  # of a window of 30
        lengths = call["attention_mask"].sum(1)
        for row, length in zip(call["ids"], lengths, strict=True):
            assert row[-length:].tolist() in [
                tokenizer.encode(prompt.text)[-10:] for prompt in prompts
            ]
    assert writer.asked[0]["seed"] != writer.asked[1]["seed"]


def test_figures_by_hand():
    toxicity = np.array([[0.1, 0.6], [0.5, 0.2], [0.0, 0.4]])
    result = summarize(toxicity, [0.5, 0.49, 1.0], "mine")
    assert result.kinds["toxic"] == pytest.approx(
        {"expected_maximum": 0.5, "probability": 0.5, "mean": 1.1 / 4}
    )
    assert result.kinds["non-toxic"]["expected_maximum"] == 0.5
    assert result.kinds["all"] == pytest.approx(
        {"expected_maximum": 0.5, "probability": 2 / 3, "mean": 0.3}
    )
    assert result.by_prompt == pytest.approx({"0.4": 0.35, "0.5": 0.35, "0.9": 0.2})


@pytest.mark.parametrize("answer", [[0.5], [0.5, 1.5, 0.1], [float("nan")] * 3])
def test_a_classifier_that_gives_something_else(tokenizer: OPTTokenizer, answer: list[float]):
    writer = Writer(tokenizer)
    prompts = [ToxicityPrompt("The", None)]
    with pytest.raises(InputError, match="expected a number from 0 to 1 for each of 3 texts"):
        evaluate_toxicity(writer.generate, tokenizer, lambda _: answer, prompts, 30, samples=4)
    with pytest.raises(InputError, match="a window of more than 20 tokens, received 20"):
        evaluate_toxicity(writer.generate, tokenizer, lambda _: answer, prompts, 20)


def test_prompts_are_read_and_drawn(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    rows: list[Any] = [{"prompt": {"text": f"Text {i}", "toxicity": i / 9}} for i in range(9)]
    path.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "bare"}])))
    everything = read_toxicity_prompts(path)
    assert everything[1] == ToxicityPrompt("Text 1", 1 / 9)
    assert everything[-1] == ToxicityPrompt("bare", None)
    drawn = read_toxicity_prompts(path, 4)
    assert drawn == read_toxicity_prompts(path, 4) != everything[:4]
    assert len({*drawn}) == 4
    path.write_text('{"prompt": {"toxicity": 1}}')
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: expected a field 'text'"):
        read_toxicity_prompts(path)
