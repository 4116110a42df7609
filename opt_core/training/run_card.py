"""The model card of a run: what the model was made from, how, and what is known about it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opt_core.hub import is_hub_id
from opt_core.model_card import table, write_card
from opt_core.training.config import TrainConfig
from opt_core.training.run_folder import MODEL_FOLDER, RunState, read_metrics
from opt_core.version import __version__

_UNMEASURED = """\
Nothing but the losses above has been measured. `opt-lm eval` measures perplexity, choices, classes,
answers and bias."""
_LIMITS = """\
- A language model repeats what its texts hold, prejudices and errors included. OPT's own texts are
  largely unfiltered text of the Internet (section 5 of its paper, arXiv:2205.01068, and its model
  card); what this model was trained on adds its own.
- What it writes may be wrong, insulting or somebody's private data: a person should read it before
  it is acted upon.
- Bias and toxicity of this model have not been measured.
- The licence of the model that it was made from holds for it too."""


def write_run_card(
    folder: Path,
    config: TrainConfig,
    about: Mapping[str, Any],
    model: Mapping[str, Any],
    state: RunState,
) -> None:
    """Writes RUN/model/README.md.

    Args:
        folder: The run's folder.
        config: How the model was trained.
        about: What else the run was started with, such as the data.
        model: The model's configuration and head.
        state: Where the run is.

    Raises:
        CheckpointError: The disk refuses.
    """
    base = str(about.get("model", ""))
    start = f"trained from `{_public(base)}`" if base else "trained"
    if about.get("from_scratch"):
        start = "trained from random weights"
    size = f"{model['num_hidden_layers']} layers of width {model['hidden_size']}"
    sections = {
        "Data": _data(config, about),
        "Training": _training(config, about, state),
        "Losses": _losses(folder, state),
        "Evaluation": _UNMEASURED,
        "Limits": _LIMITS,
    }
    text = f"An OPT model of {size}, {start} with opt-lm {__version__}.\n\n" + "\n\n".join(
        f"## {heading}\n\n{text}" for heading, text in sections.items()
    )
    known = base if not about.get("from_scratch") and is_hub_id(base) else None
    name = folder.absolute().name
    write_card(folder / MODEL_FOLDER, name, text, head=model.get("head"), base=known)


def _public(name: str) -> str:
    """A model's name where its card is read: paths mean nothing elsewhere."""
    return name if is_hub_id(name) else Path(name).name


def _data(config: TrainConfig, about: Mapping[str, Any]) -> str:
    rows = [
        (said, f"`{about[name] if name == 'task' else Path(str(about[name])).name}`")
        for name, said in (("task", "task"), ("data", "trained on"), ("validation", "validated on"))
        if about.get(name)
    ]
    rows.append(("rows", f"of at most {config.sequence_length} tokens"))
    return table(rows) + "\n\nWhose texts these are and under which licence: to be filled in."


def _training(config: TrainConfig, about: Mapping[str, Any], state: RunState) -> str:
    method = f"adapters of rank {config.lora_rank}, merged" if config.lora_rank else "AdamW"
    rows = [("method", method), ("steps", f"{state.step} of {config.batch_size} rows")]
    if state.stopped:
        rows.append(("stopped early", state.stopped))
    if "backend" in about:
        rows.append(("framework", str(about["backend"])))
    plain = asdict(TrainConfig())
    shown = ("learning_rate", "lr_schedule", "weight_decay", "precision", "seed")
    hidden = ("max_steps", "batch_size", "sequence_length")
    rows += [
        (f"`{name}`", f"`{value}`")
        for name, value in asdict(config).items()
        if name in shown or (value != plain[name] and name not in hidden)
    ]
    return table(rows)


def _losses(folder: Path, state: RunState) -> str:
    """The first and the last step's, and of validations the first, the last and the best."""
    records = read_metrics(folder)
    rows: list[tuple[str, int, str]] = []
    for name, said in (("loss", "training"), ("eval_loss", "validation")):
        found = [record for record in records if record.get(name) is not None]
        for record in {r["step"]: r for r in (*found[:1], *found[-1:])}.values():
            rows.append((said, record["step"], f"{record[name]:.4f}"))
    if state.best_step is not None and state.best_loss is not None:
        rows.append(("best validation: this model", state.best_step, f"{state.best_loss:.4f}"))
    text = table(rows, ("", "step", "nats")) if rows else "None was finite."
    skipped = f"{state.skipped} steps were skipped: their loss or gradient was not finite."
    return f"{text}\n\n{skipped}" if state.skipped else text
