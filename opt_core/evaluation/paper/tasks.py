"""The OPT paper's 16 tasks as a table: what differs between them, and nothing else."""

from dataclasses import dataclass
from typing import Literal

from opt_core.evaluation.paper import prompts, rows

Split = Literal["train", "validation", "test"]
Metric = Literal["acc", "acc_norm", "f1"]


@dataclass(frozen=True)
class PaperTask:
    r"""One task.

    Attributes:
        name: What the command line calls it.
        title: What the paper calls it.
        lm_eval: What EleutherAI's harness calls it.
        files: Patterns of its files' paths below a folder, in lower case and without suffixes, the
            first that fits wins; "{}" is the name of a split. Those of the public release and of
            the hub's Parquet.
        read: Fields of a file's row -> documents, in the hub's layout.
        word: A document -> its prompt.
        metrics: What is measured besides "acc".
        split: What is evaluated.
        examples: Where the examples before a question are drawn from.
    """

    name: str
    title: str
    lm_eval: str
    files: tuple[str, ...]
    read: rows.Reader
    word: prompts.Wording
    metrics: tuple[Metric, ...] = ()
    split: Split = "validation"
    examples: Split = "train"


_SUPERGLUE = "(super_?glue/)?"

TASKS = {
    task.name: task
    for task in (
        PaperTask(
            "hellaswag", "HellaSwag", "hellaswag", ("hellaswag_{}", "hellaswag/(data/)?{}"),
            rows.plain, prompts.hellaswag, ("acc_norm",),
        ),
        PaperTask(
            "storycloze", "StoryCloze", "storycloze_2016",
            ("cloze_test_{}__spring2016[^/]*", "story_?cloze[^/]*/(2016/)?{}"),
            rows.storycloze, prompts.storycloze, split="test", examples="validation",
        ),
        PaperTask(
            "piqa", "PIQA", "piqa", ("(piqa|physicaliqa[^/]*)/((plain_text|data)/)?{}",),
            rows.plain, prompts.piqa, ("acc_norm",),
        ),
        PaperTask(
            "arc_easy", "ARC (easy)", "arc_easy", ("arc-easy-{}", "arc-easy/{}"),
            rows.lettered, prompts.arc, ("acc_norm",), split="test",
        ),
        PaperTask(
            "arc_challenge", "ARC (challenge)", "arc_challenge",
            ("arc-challenge-{}", "arc-challenge/{}"),
            rows.lettered, prompts.arc, ("acc_norm",), split="test",
        ),
        PaperTask(
            "openbookqa", "OpenBookQA", "openbookqa",
            ("openbookqa[^/]*/(data/)?main/{}", "openbookqa[^/]*/{}"),
            rows.lettered, prompts.openbookqa, ("acc_norm",), split="test",
        ),
        PaperTask(
            "winograd", "WinoGrad", "wsc273",
            ("wscollection", "wsc273", "(wsc273|winograd[^/]*)/((wsc273|data)/)?{}"),
            rows.winograd, prompts.winograd, split="test", examples="test",
        ),
        PaperTask(
            "winogrande", "WinoGrande", "winogrande",
            ("{}_xl", "winogrande_xl/{}", "winogrande[^/]*/{}"),
            rows.plain, prompts.winogrande,
        ),
        PaperTask("boolq", "BoolQ", "boolq", (_SUPERGLUE + "boolq/{}",), rows.plain, prompts.boolq),
        PaperTask(
            "cb", "CB", "cb", (_SUPERGLUE + "cb/{}",),
            rows.labels("entailment", "contradiction", "neutral"), prompts.cb, ("f1",),
        ),
        PaperTask("copa", "COPA", "copa", (_SUPERGLUE + "copa/{}",), rows.plain, prompts.copa),
        PaperTask("wic", "WiC", "wic", (_SUPERGLUE + "wic/{}",), rows.plain, prompts.wic),
        PaperTask(
            "wsc", "WSC", "wsc", (_SUPERGLUE + r"wsc(\.fixed)?/{}",), rows.wsc, prompts.wsc
        ),
        PaperTask(
            "multirc", "MultiRC", "multirc", (_SUPERGLUE + "multirc/{}",),
            rows.multirc, prompts.multirc,
        ),
        PaperTask(
            "rte", "RTE", "sglue_rte", (_SUPERGLUE + "rte/{}",),
            rows.labels("entailment", "not_entailment"), prompts.rte,
        ),
        PaperTask(
            "record", "ReCoRD", "record", (_SUPERGLUE + "record/{}",),
            rows.record, prompts.record, ("f1",),
        ),
    )
}  # fmt: skip
"""Each task by its name, in the paper's order."""
