"""The tasks of the installed `lm-eval` on local rows: its own prompts and figures, no network."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from tests.support.files.paper_data import SPLITS, Rows

# The library's own list of its tasks takes half a minute to make.
_FILES = {
    "storycloze_2016": "storycloze/storycloze_2016",
    "arc_easy": "arc/arc_easy",
    "arc_challenge": "arc/arc_challenge",
    "winogrande": "winogrande/default",
    "wsc273": "wsc273/default",
    "sglue_rte": "super_glue/rte/default",
    **{name: f"{name}/{name}" for name in ("hellaswag", "piqa", "openbookqa")},
    **{
        name: f"super_glue/{name}/default"
        for name in ("boolq", "cb", "copa", "wic", "wsc", "multirc", "record")
    },
}


def _squad_metrics() -> None:
    """A module that the harness' ReCoRD imports and `transformers` 5 has no more.

    It is empty: what the harness computes with it (`process_results`) cannot be asked for.
    """
    name = "transformers.data.metrics"
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        for missing in (name, f"{name}.squad_metrics"):
            sys.modules.setdefault(missing, ModuleType(missing))


def local_task(name: str, rows: Rows, folder: Path, shots: int = 0) -> Any:
    """A task as installed, its data replaced: every split has the same rows.

    Args:
        name: What `lm-eval` calls it.
        rows: Its documents.
        folder: Where to put them.
        shots: Examples before each question.
    """
    if name == "record":
        _squad_metrics()
    file = folder / f"{name}.json"
    file.write_text("\n".join(map(json.dumps, rows)))
    tasks = Path(lm_eval.tasks.__file__).parent
    config = load_yaml(tasks / f"{_FILES[name]}.yaml") | {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(file) for split in SPLITS},
            "cache_dir": str(folder / "cache"),
        },
        "num_fewshot": shots,
    }
    assert config["task"] == name
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(1234)
    return task


def requests_of(task: Any, shots: int = 0) -> list[list[Any]]:
    """The questions of a task, for each of its documents: the harness' instances."""
    return [
        task.construct_requests(doc, task.fewshot_context(doc, shots)) for doc in task.eval_docs
    ]
