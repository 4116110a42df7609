"""`opt-lm eval`: how good a model is, on local files in the public data sets' formats."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from opt_cli import console
from opt_cli.backends import AUTO, Backend, load_backend
from opt_cli.commands import App
from opt_cli.devices import on_mesh
from opt_core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from opt_core import OPTTokenizer
    from opt_core.config import OPTConfig

app = App(help="Measure a model: perplexity, choices, classes, answers, bias.")

Model = Annotated[
    str, typer.Option("--model", "-m", help='Folder, hub id or "mini".', metavar="MODEL")
]
Adapter = Annotated[
    str | None, typer.Option(help="PEFT adapter to merge: folder or hub id.", metavar="MODEL")
]
Dtype = Annotated[
    str, typer.Option(help="Type of the weights: float32, bfloat16 ...", metavar="NAME")
]
Quantize = Annotated[str | None, typer.Option(help="int8 or int4.", metavar="NAME")]
BatchSize = Annotated[
    int, typer.Option("--batch-size", "-b", help="Rows at a time.", min=1, metavar="N")
]
Limit = Annotated[
    int | None, typer.Option(help="Look at no more than so many.", min=1, metavar="N")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
DataFile = Annotated[Path, typer.Argument(help="The data.", metavar="FILE")]


@app.command("perplexity")
@on_mesh
def perplexity(
    file: Annotated[Path, typer.Argument(help="A text file, UTF-8.", metavar="FILE")],
    model: Model = "mini",
    adapter: Adapter = None,
    backend: Backend = AUTO,
    dtype: Dtype = "float32",
    quantize: Quantize = None,
    window: Annotated[
        int | None,
        typer.Option(help="Tokens of a row (default: all the model takes).", min=2, metavar="N"),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Let rows overlap: so far is one from the next (default: they do not).",
            min=1,
            metavar="N",
        ),
    ] = None,
    batch_size: BatchSize = 8,
    limit: Limit = None,
    json: Json = False,
    *,
    devices: Any,
) -> None:
    """Perplexity and bits per byte of a text.

    Without --stride by the protocol of the GPTQ paper, in which OPT's published figures are: the
    text as one row of tokens, cut into windows, the rest dropped. WikiText-2's test texts are
    joined with an empty line between them there.
    """
    from opt_core.data import read_text
    from opt_core.evaluation import text_perplexity

    text = read_text(file)
    loaded = load(model, adapter, backend, dtype, quantize, devices=devices)
    with console.progress("scoring", unit="windows") as progress:
        result = text_perplexity(
            loaded.token_scores,
            text,
            loaded.tokenizer,
            window or loaded.config.max_position_embeddings,
            stride,
            batch_size,
            limit,
            progress,
        )
    _print(asdict(result), json)


@app.command("multiple-choice")
@on_mesh
def multiple_choice(
    file: DataFile,
    model: Model = "mini",
    adapter: Adapter = None,
    backend: Backend = AUTO,
    dtype: Dtype = "float32",
    quantize: Quantize = None,
    batch_size: BatchSize = 8,
    limit: Limit = None,
    json: Json = False,
    *,
    devices: Any,
) -> None:
    """Zero-shot multiple choice by log-likelihood: acc and acc_norm.

    The file is LAMBADA's, PIQA's (with labels in it), HellaSwag's or ARC's, as JSON lines or
    Parquet, or has the fields context, choices and label.
    """
    from opt_core.evaluation import evaluate_choices, read_items

    format, items = read_items(file, limit)
    loaded = load(model, adapter, backend, dtype, quantize, devices=devices)
    with console.progress("scoring", unit="rows") as progress:
        result = evaluate_choices(
            loaded.token_scores,
            loaded.tokenizer,
            items,
            loaded.config.max_position_embeddings,
            format,
            batch_size,
            progress,
        )
    _print(asdict(result), json)


@app.command("classification")
@on_mesh
def classification(
    file: DataFile,
    model: Model,
    adapter: Adapter = None,
    backend: Backend = AUTO,
    dtype: Dtype = "float32",
    text_field: Annotated[str, typer.Option(help="Where the text is.", metavar="NAME")] = "text",
    pair_field: Annotated[
        str | None, typer.Option(help="Where a second text is.", metavar="NAME")
    ] = None,
    label_field: Annotated[str, typer.Option(help="Where the label is.", metavar="NAME")] = "label",
    max_length: Annotated[
        int | None,
        typer.Option(help="Cut longer texts (default: all the model takes).", min=1, metavar="N"),
    ] = None,
    batch_size: BatchSize = 8,
    limit: Limit = None,
    json: Json = False,
    *,
    devices: Any,
) -> None:
    """Accuracy, macro and micro F1 and the confusion matrix of a classifier.

    The file has a text and a label in each row: JSON lines, CSV, TSV or Parquet. Labels are class
    numbers, or the names in the model's id2label.
    """
    from opt_core.data import encode_labelled_texts, read_labelled_texts
    from opt_core.evaluation import evaluate_classification

    if not file.exists():  # or it would be told after the model has been loaded
        raise DataError(f"{file}: no such file or folder")
    loaded = load(
        model, adapter, backend, dtype, kind="OPTForSequenceClassification", devices=devices
    )
    known = loaded.config.id2label or {}
    names = [known.get(i, f"LABEL_{i}") for i in range(loaded.config.num_labels)]
    data = read_labelled_texts(file, names, text_field, label_field, pair_field, limit)
    length = max_length or loaded.config.max_position_embeddings
    examples = encode_labelled_texts(data, loaded.tokenizer, length)
    with console.progress("classifying", unit="texts") as progress:
        result = evaluate_classification(
            loaded.bound("class_logits"), examples, names, batch_size, progress
        )
    values = asdict(result)
    if json:
        console.print_json(values)
        return
    classes, confusion = values.pop("classes"), values.pop("confusion")
    _print(values, json)
    rows = [(name, *scores.values()) for name, scores in classes.items()]
    console.table(("class", "precision", "recall", "f1", "support"), rows)
    rows = [(name, *counts) for name, counts in zip(names, confusion, strict=True)]
    console.table(("taken for", *names), rows)


@app.command("qa")
@on_mesh
def qa(
    file: DataFile,
    model: Model,
    adapter: Adapter = None,
    backend: Backend = AUTO,
    dtype: Dtype = "float32",
    max_length: Annotated[int, typer.Option(help="Tokens of a row.", min=8, metavar="N")] = 384,
    stride: Annotated[
        int, typer.Option(help="Tokens that two rows share.", min=0, metavar="N")
    ] = 128,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Write the answers there, as SQuAD's script reads them.", metavar="FILE"),
    ] = None,
    batch_size: BatchSize = 8,
    limit: Limit = None,
    json: Json = False,
    *,
    devices: Any,
) -> None:
    """Exact match and F1 of extractive answers, as SQuAD defines them.

    The file is SQuAD's JSON (1.1 or 2.0), or JSON lines or Parquet with the same fields.
    """
    from opt_core.data import encode_questions, read_questions
    from opt_core.evaluation import evaluate_questions
    from opt_core.json_files import write_json

    questions = read_questions(file, limit)
    loaded = load(model, adapter, backend, dtype, kind="OPTForQuestionAnswering", devices=devices)
    length = min(max_length, loaded.config.max_position_embeddings)
    windows = encode_questions(questions, loaded.tokenizer, length, stride, training=False)
    with console.progress("answering", unit="rows") as progress:
        result = evaluate_questions(
            loaded.bound("span_logits"), questions, windows, batch_size, progress
        )
    if predictions is not None and not console.is_muted():
        write_json(predictions, result.answers)
    values = {**asdict(result), "dropped": windows.dropped}
    if not json:
        del values["answers"]
    _print(values, json)


@app.command("bias")
@on_mesh
def bias(
    file: DataFile,
    model: Model = "mini",
    adapter: Adapter = None,
    backend: Backend = AUTO,
    dtype: Dtype = "float32",
    quantize: Quantize = None,
    batch_size: BatchSize = 8,
    limit: Limit = None,
    json: Json = False,
    *,
    devices: Any,
) -> None:
    """Which of two sentences a model prefers, on CrowS-Pairs (.csv) or StereoSet (.json)."""
    from opt_core.evaluation import evaluate_bias, read_comparisons

    format, comparisons = read_comparisons(file, limit)
    loaded = load(model, adapter, backend, dtype, quantize, devices=devices)
    with console.progress("scoring", unit="rows") as progress:
        result = evaluate_bias(
            loaded.token_scores,
            loaded.tokenizer,
            comparisons,
            loaded.config.max_position_embeddings,
            format,
            batch_size,
            progress,
        )
    _print(asdict(result), json)


@app.command("harness")
@on_mesh
def harness(
    tasks: Annotated[
        list[str], typer.Argument(help="Tasks of lm-eval, such as lambada_openai.", metavar="TASK")
    ],
    model: Model = "mini",
    adapter: Adapter = None,
    backend: Backend = AUTO,
    dtype: Dtype = "float32",
    quantize: Quantize = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with task files of your own.", metavar="DIR")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question.", min=0, metavar="N")
    ] = None,
    batch_size: BatchSize = 8,
    limit: Limit = None,
    json: Json = False,
    *,
    devices: Any,
) -> None:
    r"""Tasks of EleutherAI's lm-eval, which is to be installed: pip install 'opt-lm\[lm-eval]'."""
    try:
        lm_eval, lm_tasks = import_module("lm_eval"), import_module("lm_eval.tasks")
    except ImportError:
        raise ConfigError("harness needs lm-eval: pip install 'opt-lm[lm-eval]'") from None
    from opt_core.evaluation.lm_eval import HarnessLM

    manager = lm_tasks.TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := sorted({*tasks} - {*manager.all_tasks}):
        raise ConfigError(f"lm-eval knows no task {', '.join(unknown)}; its own list: lm_eval ls")
    loaded = load(model, adapter, backend, dtype, quantize, devices=devices)
    window = loaded.config.max_position_embeddings
    wrapped = HarnessLM(
        loaded.token_scores, loaded.model.generate, loaded.tokenizer, window, batch_size
    )
    found = lm_eval.simple_evaluate(
        wrapped, tasks=tasks, num_fewshot=num_fewshot, limit=limit, task_manager=manager,
        log_samples=False,
    )  # fmt: skip
    results: dict[str, Any] = {} if found is None else found["results"]
    if json:
        console.print_json(results)
        return
    rows = [
        (task, name.removesuffix(",none"), value)
        for task, values in results.items()
        for name, value in values.items()
        if isinstance(value, int | float) and name != "sample_len"
    ]
    console.table(("task", "metric", "value"), rows)


class Loaded(NamedTuple):
    """A model on a backend, behind the functions that score with it."""

    model: Any
    tokenizer: "OPTTokenizer"
    scoring: Any

    @property
    def config(self) -> "OPTConfig":
        """The model's configuration."""
        return self.model.config

    @property
    def token_scores(self) -> Callable[..., Any]:
        """The likelihoods of tokens."""
        return self.bound("token_scores")

    def bound(self, name: str) -> Callable[..., Any]:
        """A function of the backend's scoring, the model given."""
        return partial(getattr(self.scoring, name), self.model)


def load(
    model: str,
    adapter: str | None,
    backend: str,
    dtype: str,
    quantize: str | None = None,
    kind: str = "OPTForCausalLM",
    devices: Any = None,
) -> Loaded:
    """Loads a model, of the kind that is named, with its tokenizer.

    Args:
        model: Folder, hub id or "mini".
        adapter: PEFT adapter to merge; None: none.
        backend: torch, tf or flax.
        dtype: Type of the weights.
        quantize: Scheme; None: none.
        kind: Class of the model, as PyTorch's is called.
        devices: Mesh to spread it over; None: one device.
    """
    from opt_core import OPTTokenizer
    from opt_core.adapters.folders import tokenizer_folder
    from opt_core.hub import resolve

    path = resolve(model)
    options: dict[str, Any] = {"offload": "auto"} if devices is None else {"mesh": devices}
    tokenizer = OPTTokenizer.from_pretrained(tokenizer_folder(path, adapter))
    with console.progress(f"loading {model}") as progress, console.notices("offload: "):
        made = load_backend(backend, kind).from_pretrained(
            path, dtype=dtype, quantize=quantize, progress=progress, adapter=adapter, **options
        )
    return Loaded(made, tokenizer, import_module(f"opt_{backend}.scoring"))


def _print(values: dict[str, Any], json: bool) -> None:
    """A result as one JSON object, or as lines of names and values."""
    if json:
        console.print_json(values)
        return
    flat: list[tuple[Any, ...]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += [(f"  {part}", number) for part, number in value.items()]
        elif value is not None:
            flat.append((name, value))
    console.table(None, flat)
