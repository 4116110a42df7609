"""How a task is scored: prompts with examples before them, likelihoods, figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from opt_core.errors import DataError
from opt_core.evaluation.metrics import (
    accuracy,
    answer_f1,
    class_scores,
    confusion_matrix,
    exact_match,
    most_likely,
)
from opt_core.evaluation.paper.prompts import Prompt
from opt_core.evaluation.paper.rows import Doc
from opt_core.evaluation.paper.tasks import PaperTask
from opt_core.evaluation.perplexity import Progress, TokenScores, score_continuations
from opt_core.text.tokenizer import OPTTokenizer

SEED = 1234
"""Draws the examples: the harness' own, so that it draws the same."""


@dataclass(frozen=True)
class TaskResult:
    """How well a task was done.

    Attributes:
        task: Its name.
        shots: Examples before each question.
        items: Questions.
        acc: Share of questions whose right choice is the likeliest; ReCoRD's is its exact match.
        acc_error: Standard error of `acc`.
        acc_norm: The same with likelihoods per character; None where the task has no such figure.
        f1: CB's mean F1 of the three classes, ReCoRD's of the words; None elsewhere.
        chance: What guessing gives; None where it is not known.
    """

    task: str
    shots: int
    items: int
    acc: float
    acc_error: float
    acc_norm: float | None = None
    f1: float | None = None
    chance: float | None = None


def make_prompts(
    task: PaperTask, docs: Sequence[Doc], shots: int = 0, examples: Sequence[Doc] = ()
) -> list[Prompt]:
    """The questions of a task, each with examples before it.

    Examples are drawn without replacement, anew for each question, and an empty line follows each;
    a question is never its own example. They are those that the harness draws with its usual seed
    (not WinoGrad's: there a question may be among its own examples).

    Args:
        task: The task.
        docs: What is asked, from `read_docs`.
        shots: Examples before each question.
        examples: What they are drawn from; may hold the questions.

    Raises:
        DataError: There are too few examples, or a document does not say what is right.
    """
    # The harness draws one more where a question might be among the examples, and drops it or one.
    spare = int(task.split == "validation" or task.split == task.examples)
    if shots and len(examples) < shots + spare:
        raise DataError(
            f"{task.title}: {shots} examples: expected at least {shots + spare} rows of its "
            f"{task.examples} split, found {len(examples)}"
        )
    random = Random(SEED)
    questions: list[Prompt] = []
    for number, doc in enumerate(docs, 1):
        prompt = _word(task, doc, number)
        if shots:
            drawn = random.sample(list(examples), shots + spare)
            shown = [shot for shot in drawn if not spare or shot != doc][:shots]
            before = "".join(f"{_word(task, shot, 0).example}\n\n" for shot in shown)
            prompt = prompt._replace(contexts=tuple(before + text for text in prompt.contexts))
        questions.append(prompt)
    return questions


def _word(task: PaperTask, doc: Doc, number: int) -> Prompt:
    try:
        prompt = task.word(doc)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"{task.title}, row {number}: not laid out as its public files: {error!r}"
        ) from None
    if not 0 <= prompt.label < len(prompt.endings):
        raise DataError(
            f"{task.title}, row {number}: expected a label below {len(prompt.endings)}, found "
            f"{prompt.label}; a split without labels cannot be evaluated"
        )
    return prompt


def score_prompts(
    token_scores: TokenScores,
    tokenizer: OPTTokenizer,
    prompts: Sequence[Prompt],
    window: int,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[list[float]]:
    """The log-likelihood of each choice of each question, in nats.

    Args:
        token_scores: The model's.
        tokenizer: The model's.
        prompts: From `make_prompts`.
        window: Most tokens of a row; longer contexts lose their beginning.
        batch_size: Rows at a time.
        progress: Called after each batch.
    """
    pairs = [pair for p in prompts for pair in zip(p.contexts, p.endings, strict=True)]
    scores = iter(score_continuations(token_scores, tokenizer, pairs, window, batch_size, progress))
    return [[next(scores).log_likelihood for _ in prompt.endings] for prompt in prompts]


def judge(
    task: PaperTask, prompts: Sequence[Prompt], scores: Sequence[Sequence[float]], shots: int = 0
) -> TaskResult:
    """The figures of a task.

    Args:
        task: The task.
        prompts: From `make_prompts`.
        scores: From `score_prompts`.
        shots: Examples that the prompts have.
    """
    chosen = [most_likely(values) for values in scores]
    labels = [prompt.label for prompt in prompts]
    right = [float(c == label) for c, label in zip(chosen, labels, strict=True)]
    chances = [1 / len(prompt.endings) for prompt in prompts]
    f1 = None
    if prompts[0].names:
        named = [(p.names[c], p.answers) for p, c in zip(prompts, chosen, strict=True)]
        right = [exact_match(*pair) for pair in named]
        f1 = float(np.mean([answer_f1(*pair) for pair in named]))
        chances = [len({*p.names} & {*p.answers}) / len(p.names) for p in prompts]
    elif "f1" in task.metrics:
        matrix = confusion_matrix(chosen, labels, len(prompts[0].endings))
        f1 = float(class_scores(matrix).f1.mean())
    normal = None
    if "acc_norm" in task.metrics:
        pairs = zip(scores, prompts, strict=True)
        normal = accuracy([most_likely(values, p.lengths) for values, p in pairs], labels)
    spread = float(np.std(right, ddof=1)) if len(right) > 1 else 0.0
    return TaskResult(
        task.name,
        shots,
        len(prompts),
        float(np.mean(right)),
        spread / len(right) ** 0.5,
        normal,
        f1,
        float(np.mean(chances)),
    )
