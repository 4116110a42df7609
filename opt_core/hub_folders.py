"""Folders to and from the hub: a model downloaded to a place of one's own, and uploaded.

What a repository or a folder holds is moved by huggingface_hub, which shows its own progress.
"""

from os import PathLike
from pathlib import Path
from typing import Any

from opt_core.errors import CheckpointError
from opt_core.hub import (
    _first_line,  # pyright: ignore[reportPrivateUsage]
    _hub_failures,  # pyright: ignore[reportPrivateUsage]
    is_hub_id,
    resolve,
)

_WITH_IT = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")
_CACHE = ".cache"
"""Where huggingface_hub notes, inside a folder, what it has downloaded into it."""


def download(
    name: str,
    folder: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> dict[str, int]:
    """Downloads what a model needs, its card and its licence; the weights in one format.

    The files that an interrupted download has brought are kept, and the next one fetches the rest.

    Args:
        name: Hub id.
        folder: A new folder, or the one of an earlier download of the same model.
        revision: Branch, tag or commit; None means the default branch.
        token: As in `opt_core.hub.resolve`.

    Returns:
        Name -> bytes, of every file in the folder.

    Raises:
        CheckpointError: There is no such model on the hub, it cannot be had, or the folder holds
            something else.
    """
    folder = Path(folder)
    if not is_hub_id(name):
        raise CheckpointError(f"{name}: expected a hub id such as facebook/opt-125m")
    if folder.exists() and not (folder.is_dir() and _may_be_filled(folder)):
        raise CheckpointError(f"{folder}: already exists; expected a new folder")
    resolve(
        name, revision=revision, token=token, optional=_WITH_IT, convertible=True, local_dir=folder
    )
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return {file: size for file, size in sizes.items() if not file.startswith(f"{_CACHE}/")}


def upload(
    folder: str | PathLike[str],
    name: str,
    *,
    message: str | None = None,
    description: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
) -> Any:
    """Uploads a folder's files in one commit; the repository is made if it is missing.

    Args:
        folder: The folder.
        name: Hub id, such as "me/my-opt"; without "me/" of the token's owner.
        message: Title of the commit.
        description: Of the commit.
        private: Whether a new repository is private; None: as the owner's account has it.
        revision: The branch; None: the default one.
        create_pr: Propose the files as a pull request.
        token: As in `opt_core.hub.resolve`.

    Returns:
        huggingface_hub's `CommitInfo`.

    Raises:
        CheckpointError: The hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi  # huggingface_hub is imported only when it is needed

    api = HfApi(token=token)
    try:
        made = api.create_repo(name, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=made,
            folder_path=Path(folder),
            commit_message=message or "Upload an OPT model",
            commit_description=description,
            revision=revision,
            create_pr=create_pr,
        )
    except _hub_failures() as error:
        raise CheckpointError(f"{name}: not uploaded ({_first_line(error)})") from error


def _may_be_filled(folder: Path) -> bool:
    return (folder / _CACHE / "huggingface").is_dir() or not any(folder.iterdir())
