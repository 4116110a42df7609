"""The paper's tasks through EleutherAI's `lm-eval`, which fetches their data.

Needs the extra `lm-eval`; nothing else in this package imports this module.
"""
# pyright: basic, reportMissingImports=false
# The library is not there where types are checked.

from functools import cache
from importlib import import_module
from typing import Any

from opt_core.errors import DataError, OPTError
from opt_core.evaluation.lm_eval import HarnessLM
from opt_core.evaluation.paper.evaluate import TaskResult
from opt_core.evaluation.paper.tasks import PaperTask


def evaluate_with_harness(
    lm: HarnessLM, task: PaperTask, shots: int = 0, limit: int | None = None
) -> TaskResult:
    """Runs one of the paper's tasks as the harness has it.

    Args:
        lm: The model, behind the harness' interface.
        task: The task.
        shots: Examples before each question.
        limit: Questions at most.

    Raises:
        DataError: The data cannot be fetched, or the task does not run with what is installed.
    """
    lm_eval: Any = import_module("lm_eval")
    try:
        found = lm_eval.simple_evaluate(
            lm, tasks=[task.lm_eval], num_fewshot=shots, limit=limit, log_samples=False,
            task_manager=_manager(),
        )  # fmt: skip
    except OPTError:
        raise
    except Exception as error:  # of datasets, of the hub, of a task's own imports
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(
            f"lm-eval cannot run {task.title} ({reason}); name a folder with its files: --data"
        ) from None
    if found is None:
        raise DataError(f"{task.title}: lm-eval gave no results")
    ((name, values),) = found["results"].items()
    acc: Any = values.get("acc,none", values.get("em,none"))
    error = values.get("acc_stderr,none", values.get("em_stderr,none"))
    if task.name == "multirc":  # its labels stand the other way round there
        acc = 1 - acc
    return TaskResult(
        task.name,
        shots,
        found["n-samples"][name]["effective"],
        acc,
        error if isinstance(error, float) else 0.0,
        values.get("acc_norm,none") if "acc_norm" in task.metrics else None,
        values.get("f1,none") if "f1" in task.metrics else None,
    )


@cache
def _manager() -> Any:
    """The harness' list of its tasks, which takes a while to make."""
    tasks: Any = import_module("lm_eval.tasks")
    return tasks.TaskManager()
