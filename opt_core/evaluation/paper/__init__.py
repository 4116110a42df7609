"""The OPT paper's evaluation: its 16 tasks, bias and toxicity (arXiv 2205.01068, sections 3 and 4).

`tasks` is the table of tasks; `files` finds their public files, `rows` reads them, `prompts` words
them, `evaluate` scores, `report` shows. `harness` runs the same tasks through `lm-eval`.
"""

from opt_core.evaluation.paper.evaluate import (
    TaskResult,
    judge,
    make_prompts,
    score_prompts,
)
from opt_core.evaluation.paper.figures import PublishedFigure, model_size, published
from opt_core.evaluation.paper.files import find_task_files, read_docs
from opt_core.evaluation.paper.report import PaperResult, results_markdown, table_rows
from opt_core.evaluation.paper.tasks import TASKS, PaperTask

__all__ = [
    "TASKS",
    "PaperResult",
    "PaperTask",
    "PublishedFigure",
    "TaskResult",
    "find_task_files",
    "judge",
    "make_prompts",
    "model_size",
    "published",
    "read_docs",
    "results_markdown",
    "score_prompts",
    "table_rows",
]
