"""`opt-lm prepare`: files of text, cleaned and tokenised for training."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_cli import console

if TYPE_CHECKING:
    from opt_core.data import DataReport


def prepare(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="Files or folders: .txt, .jsonl, .csv, .tsv (also .gz, .zst), .parquet, or a "
            "folder of save_to_disk; and last the new folder to write.",
            metavar="FILE... DIR",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="Whose tokenizer: a folder, a hub id or mini.", metavar="MODEL"
        ),
    ] = "mini",
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", "-t", help="Tokens of a block.", min=2, metavar="N")
    ] = 2048,
    validation: Annotated[
        float | None,
        typer.Option(
            help="Share of the documents to hold out (default: 0.01; of little text, none).",
            min=0,
            max=1,
            metavar="X",
        ),
    ] = None,
    text_field: Annotated[
        str, typer.Option(help="Where the text is in rows.", metavar="NAME")
    ] = "text",
    separator: Annotated[
        str | None,
        typer.Option(
            help=r"What separates documents of a text file, such as '\n\n' (default: none does).",
            metavar="TEXT",
        ),
    ] = None,
    normalization: Annotated[str, typer.Option(help="NFC, NFKC or none.", metavar="NAME")] = "NFC",
    min_chars: Annotated[int, typer.Option(help="Drop shorter documents.", min=1, metavar="N")] = 1,
    max_chars: Annotated[
        int | None, typer.Option(help="Drop longer documents.", metavar="N")
    ] = None,
    max_repetition: Annotated[
        float,
        typer.Option(
            help="Drop documents that repeat more of their five-word sequences; 1: none.",
            metavar="X",
        ),
    ] = 0.5,
    near_duplicates: Annotated[
        float,
        typer.Option(
            help="Drop documents so similar to an earlier one; 1: equal ones only.", metavar="X"
        ),
    ] = 0.8,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Drop no duplicate at all.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Drop and count what cannot be read.")
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Share of each FILE in the text, such as 3,1 (default: all of every one).",
            metavar="TEXT",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="Processes (default: one per core).", min=1, metavar="N")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="processes, or ray: the cluster of RAY_ADDRESS, or this machine's.",
            metavar="NAME",
        ),
    ] = "processes",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Turn text into token blocks for `opt-lm train`: DIR/train, DIR/validation, DIR/report.json.

    Documents are cleaned, duplicates dropped, and an end-of-text token put between them. The new
    folder appears when it is complete.
    """
    from opt_core import OPTTokenizer
    from opt_core.data import Cleaning, DataConfig, prepare
    from opt_core.errors import DataError

    if processes is not None and engine == "ray":
        raise DataError("--processes has no effect with --engine ray: it takes all of its cluster")
    if len(paths) < 2:
        raise DataError("expected files to read and, last, a folder to write")
    cleaning = Cleaning(
        None if normalization.lower() == "none" else normalization,  # type: ignore[arg-type]
        min_chars,
        max_chars,
        max_repetition,
        near_duplicates,
        not keep_duplicates,
    )
    if separator is not None:
        separator = separator.replace("\\n", "\n").replace("\\t", "\t")
    config = DataConfig(
        sequence_length, validation, text_field, separator, skip_bad, cleaning,
        _weights(weights),
    )  # fmt: skip
    tokenizer = OPTTokenizer.from_pretrained(model)
    start = time.monotonic()
    with console.progress("preparing") as progress:
        report = prepare(
            *(paths[:-1], paths[-1], tokenizer, config, processes or os.cpu_count() or 1, progress),
            engine=engine,
        )
    seconds = time.monotonic() - start
    if json:
        console.print_json({**report.to_dict(), "seconds": round(seconds, 3)})
        return
    _print(report, seconds)


def _weights(text: str | None) -> tuple[float, ...] | None:
    from opt_core.errors import DataError

    try:
        return None if text is None else tuple(map(float, text.split(",")))
    except ValueError:
        raise DataError(f"--weights: expected numbers such as 3,1, received {text!r}") from None


def _print(report: "DataReport", seconds: float) -> None:
    rows: list[tuple[Any, ...]] = [
        (name, split.documents, split.tokens, split.blocks, split.left_out)
        for name, split in report.splits.items()
    ]
    console.table(("kept", "documents", "tokens", "blocks", "tokens left out"), rows)
    if len(report.sources) > 1:
        console.write("\n")
        sources = [
            (name, x.documents, x.kept, x.tokens, f"{100 * x.share:.2f}", "" if x.is_exhausted else
             "in part") for name, x in report.sources.items()
        ]  # fmt: skip
        header = ("source", "documents", "kept", "tokens", "% of tokens", "read")
        console.table(header, sources)
    if report.dropped:
        console.write("\n")
        dropped = [
            (reason, count, report.examples[reason][0]) for reason, count in report.dropped.items()
        ]
        console.table(("dropped", "documents", "first"), dropped)
    console.write("\n")
    if "validation" not in report.splits:
        console.note("nothing is held out for validation")
    rate = report.bytes / 1e6 / max(seconds, 1e-9)
    console.note(
        f"{report.documents} documents in {report.files} files, {report.bytes / 1e6:.4g} MB in "
        f"{seconds:.1f} s ({rate:.3g} MB/s), {report.removed_characters} characters removed"
    )
