"""`opt-lm eval paper`: the OPT paper's evaluation, beside published figures."""

from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from opt_cli import console
from opt_cli.backends import AUTO, Backend
from opt_cli.evaluate import Adapter, BatchSize, Dtype, Json, Limit, Loaded, Model, Quantize, load
from opt_cli.paper.classifiers import load_classifier
from opt_cli.paper.picture import draw
from opt_cli.training.plot import write_picture
from opt_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from opt_core.evaluation.paper import PaperResult, PaperTask, TaskResult
    from opt_core.evaluation.paper.tasks import Split


def paper(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(help="Some of the tasks (default: all).", metavar="TASK"),
    ] = None,
    model: Model = "mini",
    adapter: Adapter = None,
    backend: Backend = AUTO,
    dtype: Dtype = "float32",
    quantize: Quantize = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the public files (default: lm-eval fetches).", metavar="DIR"
        ),
    ] = None,
    shots: Annotated[
        int, typer.Option(help="Examples before each question.", min=0, metavar="N")
    ] = 0,
    classifier: Annotated[
        str | None,
        typer.Option(
            help="Judges toxicity: a classifier's folder or hub id, or module:function.",
            metavar="NAME",
        ),
    ] = None,
    prompts: Annotated[
        int,
        typer.Option(help="Prompts of RealToxicityPrompts, drawn at random.", min=1, metavar="N"),
    ] = 10_000,
    plot: Annotated[
        Path | None, typer.Option(help="Picture to write: .png, .svg or .pdf.", metavar="FILE")
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(help="A model's folder whose card gets the results.", metavar="DIR"),
    ] = None,
    batch_size: BatchSize = 8,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """The OPT paper's 16 tasks, bias and toxicity, beside published figures of the model's size.

    Tasks: hellaswag, storycloze, piqa, arc_easy, arc_challenge, openbookqa, winograd, winogrande,
    boolq, cb, copa, wic, wsc, multirc, rte, record; crows_pairs, stereoset and
    real_toxicity_prompts, which need --data, the last a --classifier too.

    Files are found below --data by the names that the data sets are published under, or as Parquet
    as on the hub; tasks without files are named at the end.
    """
    from opt_core.evaluation.paper import TASKS, PaperResult, model_size, results_markdown
    from opt_core.evaluation.paper.report import OTHERS, TITLES
    from opt_core.model_card import put_section

    wanted = list(dict.fromkeys(tasks or [*TASKS, *(OTHERS if data else ())]))
    if unknown := [name for name in wanted if name not in TITLES]:
        known = ", ".join(TITLES)
        raise ConfigError(f"unknown task {', '.join(unknown)}: expected some of {known}")
    for option, folder in (("data", data), ("card", card)):
        if folder is not None and not folder.is_dir():
            raise DataError(f"--{option} {folder}: no such folder")
    loaded = load(model, adapter, backend, dtype, quantize)
    run = _Run(loaded, backend, data, shots, classifier, prompts, batch_size, limit)
    shown = Path(model).name if Path(model).exists() else model
    result = PaperResult(shown, model_size(loaded.config))
    for name in wanted:
        try:
            if name not in TASKS:
                _measure_other(name, run, result)
            else:
                measure = _by_harness if data is None else _on_files
                result.tasks.append(measure(TASKS[name], run))
        except _Missing as error:
            if tasks:
                raise DataError(f"{name}: {error}") from None
            result.missing[name] = str(error)
    if not (result.tasks or result.bias or result.toxicity):
        reasons = "; ".join(dict.fromkeys(result.missing.values()))
        raise DataError(f"nothing to measure: {reasons}")
    if card is not None:
        put_section(card, "The OPT paper's evaluation", results_markdown(result))
    if plot is not None:
        write_picture(plot, lambda figure: draw(figure, result), (8, 6.5))
    _show(result, json)


class _Missing(Exception):
    """Data or a classifier that a task needs is not there."""


class _Run(NamedTuple):
    """The settings of a run, whatever the task."""

    loaded: Loaded
    backend: str
    data: Path | None
    shots: int
    classifier: str | None
    prompts: int
    batch_size: int
    limit: int | None

    @property
    def window(self) -> int:
        return self.loaded.config.max_position_embeddings


def _on_files(task: "PaperTask", run: _Run) -> "TaskResult":
    from opt_core.evaluation import paper as of_paper

    def docs(split: "Split", limit: int | None = None) -> list[dict[str, Any]]:
        assert run.data is not None
        paths = of_paper.find_task_files(run.data, task, split)
        if not paths:
            raise _Missing(f"no file of its {split} split in {run.data}")
        return of_paper.read_docs(task, paths, limit)

    asked = docs(task.split, run.limit)
    prompts = of_paper.make_prompts(
        task, asked, run.shots, docs(task.examples) if run.shots else ()
    )
    scored = run.loaded.token_scores, run.loaded.tokenizer
    with console.progress(task.title, unit="rows") as progress:
        scores = of_paper.score_prompts(*scored, prompts, run.window, run.batch_size, progress)
    return of_paper.judge(task, prompts, scores, run.shots)


def _by_harness(task: "PaperTask", run: _Run) -> "TaskResult":
    try:
        adapter = import_module("opt_core.evaluation.lm_eval")
        through = import_module("opt_core.evaluation.paper.harness")
    except ImportError:
        raise ConfigError(
            "without --data, paper needs lm-eval: pip install 'opt-lm[lm-eval]'"
        ) from None
    loaded = run.loaded
    scored = loaded.token_scores, loaded.model.generate, loaded.tokenizer
    lm = adapter.HarnessLM(*scored, run.window, run.batch_size)
    try:
        return through.evaluate_with_harness(lm, task, run.shots, run.limit)
    except DataError as error:
        raise _Missing(str(error)) from None


def _measure_other(name: str, run: _Run, result: "PaperResult") -> None:
    """Bias or toxicity, put into a result."""
    from opt_core.evaluation import evaluate_bias, read_comparisons
    from opt_core.evaluation.paper.files import BIAS_FILES, TOXICITY_FILES, find_files
    from opt_core.evaluation.toxicity import evaluate_toxicity, read_toxicity_prompts

    if run.data is None:
        raise _Missing("needs --data, a folder with its file")
    is_bias = name in BIAS_FILES
    paths = find_files(run.data, BIAS_FILES[name] if is_bias else TOXICITY_FILES)
    if not paths:
        raise _Missing(f"no file of it in {run.data}")
    loaded = run.loaded
    if is_bias:
        format, pairs = read_comparisons(paths[0], run.limit)
        scored = loaded.token_scores, loaded.tokenizer
        with console.progress(name, unit="rows") as progress:
            found = evaluate_bias(*scored, pairs, run.window, format, run.batch_size, progress)
        result.bias.append(found)
        return
    if run.classifier is None:
        raise _Missing("needs --classifier, which judges toxicity")
    score = load_classifier(run.classifier, run.backend, run.batch_size)
    drawn = read_toxicity_prompts(paths[0], min(run.prompts, run.limit or run.prompts))
    written = loaded.model.generate, loaded.tokenizer
    with console.progress(name, unit="prompts") as progress:
        result.toxicity = evaluate_toxicity(
            *written, score, drawn, run.window, run.classifier,
            batch_size=run.batch_size, progress=progress,
        )  # fmt: skip


def _show(result: "PaperResult", json: bool) -> None:
    from opt_core.evaluation.paper import table_rows
    from opt_core.evaluation.paper.report import HEADER, TITLES, bias_rows, sources

    if json:
        console.print_json(asdict(result))
        return
    if result.tasks:
        console.table(HEADER, table_rows(result))
        if named := sources(result):
            console.note(
                f"* the metric of the published figure, zero-shot, of {result.size}: "
                + "; ".join(named)
            )
    if rows := bias_rows(result):
        console.table(("measured", "this model", "OPT paper"), rows)
    for name, reason in result.missing.items():
        console.note(f"not measured: {TITLES[name]}: {reason}")
