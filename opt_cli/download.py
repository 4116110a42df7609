"""`opt-lm download`: a model of the hub as a folder."""

from pathlib import Path
from typing import Annotated

import typer

from opt_cli import console


def download(
    repo: Annotated[str, typer.Argument(help="Hub id, such as facebook/opt-125m.", metavar="REPO")],
    folder: Annotated[Path, typer.Argument(help="Folder for its files.", metavar="DIR")],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit.", metavar="NAME")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Fetch what a model needs from the Hugging Face hub: settings, tokenizer, weights, card.

    Of several formats of the weights one is fetched: safetensors, or else PyTorch's, TensorFlow's,
    Flax' or KerasHub's. After an interruption the same command
    fetches the files that have not come.
    """
    from opt_core.hub_folders import download

    files = download(repo, folder, revision=revision)
    if json:
        console.print_json({"path": str(folder), "files": files})
        return
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    console.write(f"{folder}: {count}, {console.size(sum(files.values()))}\n")
