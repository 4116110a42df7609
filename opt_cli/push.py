"""`opt-lm push`: a model's folder to the hub, with its card."""

from pathlib import Path
from typing import Annotated

import typer

from opt_cli import console
from opt_core.errors import CheckpointError


def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a model, such as RUN/model.", metavar="DIR")
    ],
    repo: Annotated[
        str, typer.Argument(help="Hub id, such as me/my-opt; made if missing.", metavar="REPO")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Where it is made, nobody else may see it.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch (default: the main one).", metavar="NAME")
    ] = None,
    message: Annotated[
        str | None, typer.Option(help="Title of the commit.", metavar="TEXT")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Upload a model to the Hugging Face hub, after a look at it, with its model card.

    The card is the folder's README.md; without one, a short one is written there first. The token
    is the one of `hf auth login`, or HF_TOKEN.
    """
    from conversion import describe
    from opt_core.hub_folders import upload
    from opt_core.model_card import FILE, write_card

    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    found = describe(folder)
    if problems := list(found.problems):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{folder}: not uploaded: {problems[0]}{more}")
    if not (folder / FILE).exists():
        write_card(folder, repo.rpartition("/")[2], "", head=found.head)
    done = upload(folder, repo, message=message, private=private or None, revision=revision)
    if json:
        console.print_json({"repo": repo, "commit": done.oid, "url": str(done.commit_url)})
        return
    console.write(f"{done.commit_url}\n")
