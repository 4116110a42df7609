"""Published figures of the official sizes, to be shown beside one's own.

The OPT paper gives the accuracies of its 16 tasks as curves alone (figures 3, 4, 6 and 7 of arXiv
2205.01068), so its numbers cannot be stated; what it has in tables (section 4) is CrowS-Pairs and
StereoSet of the 175B model. For the tasks, figures that others measured on the same
weights stand in, zero-shot, with the harness' prompts and the metric that is named here:

- GPTQ (arXiv 2210.17323), appendix, fp16: PIQA, ARC (both), StoryCloze, all nine sizes. They are
  normalised accuracies but for StoryCloze, as the harness' own of the next source show.
- EleutherAI's Pythia repository, evals/opt (January 2023): WinoGrande and WSC, six sizes.

No source was found for the other tasks; they are left blank.
"""

from typing import NamedTuple

from opt_core.config import OPTConfig
from opt_core.presets import PRESETS

_GPTQ = "GPTQ, arXiv 2210.17323"
_PYTHIA = "EleutherAI/pythia, evals/opt"
_PAPER = "OPT, arXiv 2205.01068"
_SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b")
_PYTHIA_SIZES = ("125m", "1.3b", "2.7b", "6.7b", "30b", "66b")


class PublishedFigure(NamedTuple):
    """A published figure: percent, of which metric, and who says so."""

    percent: float
    metric: str
    source: str


def _row(
    metric: str, source: str, sizes: tuple[str, ...], *percents: float
) -> dict[str, PublishedFigure]:
    return {
        f"opt-{size}": PublishedFigure(percent, metric, source)
        for size, percent in zip(sizes, percents, strict=True)
    }


FIGURES: dict[str, dict[str, PublishedFigure]] = {
    "piqa": _row(
        "acc_norm", _GPTQ, _SIZES,
        62.02, 64.74, 72.36, 74.81, 76.39, 76.88, 78.18, 79.76, 81.07,
    ),
    "arc_easy": _row(
        "acc_norm", _GPTQ, _SIZES,
        39.69, 40.36, 50.93, 54.34, 60.14, 61.83, 65.40, 67.26, 71.04,
    ),
    "arc_challenge": _row(
        "acc_norm", _GPTQ, _SIZES,
        22.87, 24.06, 29.44, 31.31, 34.56, 35.75, 38.14, 40.02, 43.94,
    ),
    "storycloze": _row(
        "acc", _GPTQ, _SIZES,
        59.96, 63.21, 70.78, 71.74, 74.60, 76.64, 77.28, 77.34, 79.82,
    ),
    "winogrande": _row("acc", _PYTHIA, _PYTHIA_SIZES, 50.28, 59.75, 61.01, 65.27, 68.19, 68.75),
    "wsc": _row("acc", _PYTHIA, _PYTHIA_SIZES, 36.54, 38.46, 63.46, 42.31, 59.62, 54.81),
    "crows_pairs": _row("stereotype", _PAPER, ("175b",), 69.5),
    "stereoset": _row("icat", _PAPER, ("175b",), 60.0),
}  # fmt: skip
"""Task -> size -> figure; zero-shot."""


def published(task: str, size: str | None, shots: int = 0) -> PublishedFigure | None:
    """A published figure of a task, or None.

    Args:
        task: Name of a task, "crows_pairs" or "stereoset".
        size: Name of a preset, as from `model_size`.
        shots: Examples before each question; figures are of none.
    """
    return None if shots or size is None else FIGURES.get(task, {}).get(size)


def model_size(config: OPTConfig) -> str | None:
    """The official OPT of a configuration's shape, such as "opt-125m"; None, if it is of no size.

    Galactica and models of another vocabulary are none: theirs are other weights.
    """
    shape = ("num_hidden_layers", "hidden_size", "num_attention_heads", "ffn_dim")
    for name, fields in PRESETS.items():
        is_opt = name.startswith("opt-") and 50265 <= config.vocab_size <= 50272
        if is_opt and all(getattr(config, field) == fields[field] for field in shape):
            return name
    return None
