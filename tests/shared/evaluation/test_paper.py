"""The paper's tasks against the installed `lm-eval`: its prompts, its scores, its figures."""

import importlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from opt_core import OPTTokenizer
from opt_core.evaluation.paper import (
    TASKS,
    find_task_files,
    judge,
    make_prompts,
    read_docs,
    score_prompts,
)
from opt_core.evaluation.paper.prompts import Prompt
from opt_core.hub import resolve
from tests.support.backends import Backend
from tests.support.files.paper_data import hub_rows, write_hub, write_published
from tests.support.lm_eval_tasks import local_task, requests_of

TOLERANCE = 1e-4
"""Of a log-likelihood, in nats: the bar."""
SHOTS = 2
MINI = resolve("mini")
WINDOW = 256
# Where we draw or word examples otherwise, and say so: see `make_prompts` and `prompts.multirc`.
OTHER_EXAMPLES = {"winograd", "multirc"}


class Reference(NamedTuple):
    """lm-eval's task, and what its own model class says of each choice of each document."""

    task: Any
    docs: list[Any]
    scores: list[list[tuple[float, bool]]]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    write_published(folder)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_hub(folder)
    return folder


@pytest.fixture(scope="module")
def their_model() -> Any:
    """The harness' model on `transformers`, with nothing of ours but the files."""
    transformers = pytest.importorskip("transformers")
    make: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
    return make(
        pretrained=transformers.AutoModelForCausalLM.from_pretrained(MINI, dtype="float32"),
        tokenizer=transformers.AutoTokenizer.from_pretrained(MINI),
        add_bos_token=True,
        batch_size=8,
        device="cpu",
    )


def ours(name: str, folder: Path, shots: int = 0) -> list[Prompt]:
    task = TASKS[name]
    docs, examples = (
        read_docs(task, find_task_files(folder, task, split))
        for split in (task.split, task.examples)
    )
    return make_prompts(task, docs, shots, examples)


def theirs(name: str, folder: Path, shots: int = 0) -> tuple[Any, list[list[Any]]]:
    task = local_task(TASKS[name].lm_eval, hub_rows()[name], folder, shots)
    return task, requests_of(task, shots)


def pairs(prompts: list[Prompt]) -> list[list[tuple[str, str]]]:
    return [list(zip(p.contexts, p.endings, strict=True)) for p in prompts]


@pytest.mark.parametrize("name", TASKS)
def test_log_likelihoods_and_figures_are_the_harness_s(
    name: str, published: Path, their_model: Any, tmp_path: Path
):
    task, asked = theirs(name, tmp_path)
    flat = their_model.loglikelihood([one for each in asked for one in each], disable_tqdm=True)
    scores = iter(flat)
    expected = [[next(scores) for _ in each] for each in asked]
    prompts = ours(name, published)
    model = pytest.importorskip("opt_torch").OPTForCausalLM.from_pretrained(MINI, dtype="float32")
    token_scores = partial(importlib.import_module("opt_torch.scoring").token_scores, model)
    tokenizer = OPTTokenizer.from_pretrained(MINI)
    found = score_prompts(token_scores, tokenizer, prompts, WINDOW)
    assert [len(row) for row in found] == [len(row) for row in expected]
    for row, values in zip(found, expected, strict=True):
        np.testing.assert_allclose(row, [v for v, _ in values], rtol=0, atol=TOLERANCE)
    result = judge(TASKS[name], prompts, found)
    if name == "record":
        return  # see test_record_s_figures
    per_doc = [
        task.process_results(doc, values)
        for doc, values in zip(task.eval_docs, expected, strict=True)
    ]
    figures = {
        metric: task.aggregation()[metric]([each[metric] for each in per_doc])
        for metric in per_doc[0]
    }
    if name == "multirc":
        figures["acc"] = 1 - figures["acc"]
    measured = {metric: getattr(result, metric) for metric in ("acc", *TASKS[name].metrics)}
    assert measured == pytest.approx(figures)
    assert result.items == len(asked)


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_the_harness_s(name: str, published: Path, hub: Path, tmp_path: Path):
    """From files of either layout, with examples and without, to the letter."""
    _, asked = theirs(name, tmp_path)
    expected = [[one.args for one in each] for each in asked]
    assert pairs(ours(name, published)) == expected
    assert pairs(ours(name, hub)) == expected
    _, asked = theirs(name, tmp_path, SHOTS)
    expected = [[one.args for one in each] for each in asked]
    found = pairs(ours(name, published, SHOTS))
    assert pairs(ours(name, hub, SHOTS)) == found
    if name not in OTHER_EXAMPLES:
        assert found == expected
        return
    assert found != expected
    for question, theirs_too in zip(found, expected, strict=True):
        for (context, ending), (_, their_ending) in zip(question, theirs_too, strict=True):
            *shown, last = context.split("\n\n")
            assert ending == their_ending
            assert len({*shown}) == SHOTS
            assert last + ending not in shown


def test_examples_of_multirc_say_what_is_right(published: Path):
    text = ours("multirc", published, SHOTS)[0].contexts[0]
    assert "The home of Bob\nIs the answer correct? no" in text
    assert "At home\nIs the answer correct? yes" in text


def test_record_s_figures(published: Path):
    """By hand: the first query's answer is Rome, the second's Bonn or Turin."""
    prompts = ours("record", published)[:2]
    assert [p.names for p in prompts] == [("Bonn", "Rome", "Turin")] * 2
    result = judge(TASKS["record"], prompts, [[-3.0, -1.0, -2.0], [-2.0, -1.0, -3.0]])
    assert (result.acc, result.f1, result.chance) == (0.5, 0.5, 0.5)
    result = judge(TASKS["record"], prompts, [[-3.0, -2.0, -1.0], [-2.0, -3.0, -1.0]])
    assert (result.acc, result.f1) == (0.5, 0.5)


def test_every_backend_scores_alike(backend: Backend, published: Path):
    prompts = ours("cb", published, 1)
    tokenizer = OPTTokenizer.from_pretrained(MINI)
    scoring = importlib.import_module(f"opt_{backend.name}.scoring")
    found = score_prompts(
        partial(scoring.token_scores, backend.load(MINI)), tokenizer, prompts, WINDOW
    )
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(MINI, dtype="float32")
    for prompt, row in zip(prompts, found, strict=True):
        for context, ending, value in zip(prompt.contexts, prompt.endings, row, strict=True):
            ids = np.array([tokenizer.encode(context + ending)])
            import torch

            logits = model(torch.tensor(ids)).logits[0].log_softmax(-1).detach().numpy()
            steps = logits[np.arange(ids.shape[1] - 1), ids[0, 1:]]
            count = ids.shape[1] - len(tokenizer.encode(context))
            assert value == pytest.approx(steps[-count:].sum(), abs=TOLERANCE)
