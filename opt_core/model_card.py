"""Model cards: the README.md of a model's folder, as the Hugging Face hub shows it.

A card is metadata and sections. Whoever learns something about a model, such as an evaluation, puts
a section into its card; the rest stays as it is.
"""

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from opt_core.errors import CheckpointError

FILE = "README.md"
PIPELINES = {
    "causal_lm": "text-generation",
    "sequence_classification": "text-classification",
    "question_answering": "question-answering",
}
"""Each head -> the hub's name of its task."""


def write_card(
    folder: str | PathLike[str],
    title: str,
    text: str,
    *,
    head: str | None = None,
    base: str | None = None,
    tags: Sequence[str] = (),
) -> None:
    """Writes a model's card anew.

    Args:
        folder: The model's folder.
        title: Name of the model.
        text: Markdown under the title.
        head: The model's head, as in `opt_core.params.Head`: it says what the model is for.
        base: Hub id of the model it was made from, if there is one.
        tags: More tags than "opt".

    Raises:
        CheckpointError: The disk refuses.
    """
    from huggingface_hub import ModelCard, ModelCardData  # imported only when it is needed

    data: Any = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINES.get(head or ""),
        base_model=base,
        tags=[*dict.fromkeys(["opt", *tags])],
    )
    _save(ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text.strip()}\n"), Path(folder))


def put_section(folder: str | PathLike[str], heading: str, text: str) -> None:
    """Puts a section into a model's card, in place of the one with the same heading.

    A folder without a card gets one that has nothing but this.

    Args:
        folder: The model's folder.
        heading: The section's heading, such as "Evaluation"; it is of the second level.
        text: Its markdown; headings in it are of the third level or below.

    Raises:
        CheckpointError: The card cannot be read or written.
    """
    from huggingface_hub import ModelCard

    path = Path(folder) / FILE
    if not path.exists():
        write_card(folder, path.absolute().parent.name, "")
    try:
        card: Any = ModelCard.load(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a model card: {error}") from None
    section = f"## {heading}\n\n{text.strip()}\n"
    # To the next heading that is as high; text is no template: "\1" in it stays what it is.
    old = re.compile(rf"^## {re.escape(heading)}[ \t]*\n.*?(?=^##? |\Z)", re.MULTILINE | re.DOTALL)
    if old.search(card.text):
        card.text = old.sub(lambda _: f"{section}\n", card.text, count=1).rstrip() + "\n"
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}"
    _save(card, path.parent)


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = ("", "")) -> str:
    """Rows as a table of markdown.

    Args:
        rows: Cells.
        header: Titles of the columns.
    """
    lines = [header, ["---"] * len(header), *rows]
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _save(card: Any, folder: Path) -> None:
    try:
        card.save(folder / FILE)
    except OSError as error:
        raise CheckpointError(f"{folder / FILE}: {error.strerror or error}") from None
