"""The paper's tasks through EleutherAI's `lm-eval`, which fetches their data.

Needs the extra `lm-eval`; nothing else in this package imports this module.
"""
# pyright: basic, reportMissingImports=false
# The library is not there where types are checked.

from importlib import import_module
from typing import Any

from opt_core.errors import DataError
from opt_core.evaluation.lm_eval import HarnessLM
from opt_core.evaluation.paper.evaluate import TaskResult
from opt_core.evaluation.paper.tasks import PaperTask


def evaluate_with_harness(
    lm: HarnessLM,
    task: PaperTask,
    shots: int = 0,
    limit: int | None = None,
    as_task: Any = None,
) -> TaskResult:
    """Runs one of the paper's tasks as the harness has it.

    Args:
        lm: The model, behind the harness' interface.
        task: The task.
        shots: Examples before each question.
        limit: Questions at most.
        as_task: A task object of the harness to run instead of its own of that name.

    Raises:
        DataError: The data cannot be fetched.
    """
    lm_eval: Any = import_module("lm_eval")
    asked = [as_task if as_task is not None else task.lm_eval]
    try:
        found = lm_eval.simple_evaluate(
            lm, tasks=asked, num_fewshot=shots, limit=limit, log_samples=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{task.title}: lm-eval cannot fetch its data ({' '.join(str(error).split())[:200]}); "
            "name a folder with its files: --data"
        ) from None
    if found is None:
        raise DataError(f"{task.title}: lm-eval gave no results")
    values: dict[str, Any] = found["results"][task.lm_eval]
    acc: Any = values.get("acc,none", values.get("em,none"))
    error = values.get("acc_stderr,none", values.get("em_stderr,none"))
    if task.name == "multirc":  # its labels stand the other way round there
        acc = 1 - acc
    return TaskResult(
        task.name,
        shots,
        found["n-samples"][task.lm_eval]["effective"],
        acc,
        error if isinstance(error, float) else 0.0,
        values.get("acc_norm,none") if "acc_norm" in task.metrics else None,
        values.get("f1,none") if "f1" in task.metrics else None,
    )
