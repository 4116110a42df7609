"""`push_to_hub` of `transformers`: what a `save_pretrained` writes, sent to the hub."""

from os import PathLike
from tempfile import TemporaryDirectory
from typing import Any

from opt_core.hub_folders import upload
from opt_core.model_card import write_card


class UploadMixin:
    """Gives a class that has `save_pretrained` the method `push_to_hub`."""

    model_tags: tuple[str, ...] = ()
    """Tags of the model card of an upload."""

    def save_pretrained(self, folder: str | PathLike[str]) -> Any:
        """Writes the files."""
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        use_temp_dir: bool | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_description: str | None = None,
        tags: str | list[str] | None = None,
        **options: Any,
    ) -> Any:
        """Uploads what `save_pretrained` writes to a repository of the hub, made if missing.

        Args:
            repo_id: Its name, such as "me/my-opt".
            use_temp_dir: Without effect: the files are always written to a temporary folder.
            commit_message: Of the commit.
            private: Whether a new repository is private.
            token: As in `from_pretrained`.
            revision: The branch; None: the default one.
            create_pr: Propose the files as a pull request.
            commit_description: Of the commit.
            tags: More tags for the model card.
            **options: Of `save_pretrained`, such as `max_shard_size`.

        Returns:
            huggingface_hub's `CommitInfo`.

        Raises:
            CheckpointError: The hub refuses, or cannot be reached.
        """
        more = [tags] if isinstance(tags, str) else tags or []
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, **options)
            if all_tags := [*self.model_tags, *more]:
                write_card(folder, repo_id.rpartition("/")[2], "", tags=all_tags)
            return upload(
                folder,
                repo_id,
                message=commit_message or f"Upload {type(self).__name__}",
                description=commit_description,
                private=private,
                revision=revision,
                create_pr=create_pr,
                token=token,
            )
