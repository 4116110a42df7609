"""From what a user calls a model to a folder on disk: a path, "mini", or a hub repository.

A repository often holds the same weights in several formats; only one of them is fetched.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from opt_core.checkpoints.quantized.settings import SIDE_FILE
from opt_core.errors import CheckpointError, MissingFileError

MINI = "mini"
"""The name of the model that comes with the package."""

TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_WEIGHT_FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))
_CONVERTIBLE = (*_WEIGHT_FORMATS, ("tf_model", "h5"), ("flax_model", "msgpack"))
_OTHER_WEIGHTS = re.compile(
    r"(tf_model.*\.h5|flax_model.*\.msgpack)(\.index\.json)?|model\.weights\.(h5|json)"
)
_KERAS_WEIGHTS = ("model.weights.h5", "model.weights.json")
_KERAS_HUB = re.compile(
    r"model\.weights\.json|model_\d+\.weights\.h5|metadata\.json"
    r"|assets/tokenizer/(vocabulary\.json|merges\.txt)"
)
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_TIMEOUT = 10.0  # seconds the hub may take to say what a repository holds
_EXPECTED = f'expected a folder, "{MINI}", or a hub id such as "facebook/opt-125m"'


def resolve(
    path_or_hub_id: str | PathLike[str],
    *,
    files: tuple[str, ...] | None = None,
    optional: tuple[str, ...] = (),
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    convertible: bool = False,
    cache_dir: str | PathLike[str] | None = None,
    force_download: bool = False,
    subfolder: str = "",
    variant: str | None = None,
    local_dir: str | PathLike[str] | None = None,
) -> Path:
    """Finds the folder of a model, downloading what is needed of it when it is on the hub.

    What exists on disk is taken for a path before anything else. With HF_HUB_OFFLINE=1, or when the
    hub cannot be reached, the local cache answers.

    Args:
        path_or_hub_id: A folder or file, "mini" (the model inside this package), or a hub id.
        files: Names to fetch from the hub, all of which must be there. None fetches everything a
            model needs: configuration, tokenizer, and the weights in one format (safetensors before
            pytorch_model.bin, an index with its shards before a single file).
        optional: Names to fetch as well where the repository has them.
        revision: Branch, tag or commit on the hub; None means its default branch.
        token: Access token, True for the one `hf auth login` stored, False for none, None for the
            stored one if there is one.
        local_files_only: Whether to use the hub's local cache only, without any network access.
        convertible: Whether weights that must be converted first will do, where there are no
            others.
        cache_dir: Where the hub's client keeps what it downloads; None: its own choice.
        force_download: Whether to download again what is there already.
        subfolder: Folder inside the repository, or inside the folder on disk.
        variant: Part of the names of the weight files, such as "fp16".
        local_dir: Folder for what comes from the hub, in place of the cache.

    Returns:
        A folder that holds the files, or the path itself where it names a file.

    Raises:
        CheckpointError: There is no such folder or repository, or it cannot be had.
    """
    name = os.fspath(path_or_hub_id)
    path = Path(name).expanduser() if name else None
    on_disk = path is not None and path.exists()
    if on_disk or name == MINI:
        if revision not in (None, "main"):  # transformers' default, which callers pass on
            raise CheckpointError(f"{name}: revision={revision!r} is for hub ids; this is on disk")
        found = path if path is not None and on_disk else _mini()
        if subfolder and not (found / subfolder).is_dir():
            raise MissingFileError(f"{found / subfolder}: no such folder (subfolder)")
        return found / subfolder if subfolder else found
    if _HUB_ID.fullmatch(name):
        repository = _Repository(
            name, revision, token, convertible, subfolder.strip("/"), variant,
            {"cache_dir": cache_dir, "local_dir": local_dir, "force_download": force_download},
        )  # fmt: skip
        if local_files_only:
            return repository.cached(files, optional)
        return repository.fetch(files, optional)
    if path is not None and (name.startswith((".", "~")) or "/" in name or os.sep in name):
        raise MissingFileError(f"{name}: no such folder or file")
    raise MissingFileError(f"{name!r}: no such folder; {_EXPECTED}")


@dataclass(frozen=True)
class RemoteFiles:
    """The files of a repository, parts of which can be read where they are.

    Attributes:
        name: Hub id.
        sizes: Name -> bytes, of every file.
        revision: The commit.
        token: As in `resolve`.
    """

    name: str
    sizes: dict[str, int]
    revision: str | None
    token: str | bool | None

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Bytes of a file, by one request that asks for no others.

        Raises:
            CheckpointError: The hub does not give them.
        """
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import (
            build_hf_headers,  # pyright: ignore[reportUnknownVariableType]
            hf_raise_for_status,
        )

        stop = min(stop, self.sizes[file])
        url = hf_hub_url(self.name, file, revision=self.revision)
        headers = build_hf_headers(token=self.token) | {"Range": f"bytes={start}-{stop - 1}"}
        try:
            session: Any = get_session()
            with session.stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT
            ) as response:
                hf_raise_for_status(response)
                data = b""
                if response.status_code == 206:  # else the server would send the whole file
                    for chunk in response.iter_bytes():
                        data += chunk
                        if len(data) > stop - start:
                            break
        except _hub_failures() as error:
            repository = _Repository(self.name, self.revision, self.token)
            raise repository.explained(_actual(error)) from error
        if len(data) != stop - start:
            raise CheckpointError(
                f"{self.name}: {file}: expected {stop - start} bytes, received {len(data)}; "
                "the hub does not give parts of it"
            )
        return data


def remote_files(
    name: str, revision: str | None = None, token: str | bool | None = None
) -> RemoteFiles | None:
    """Asks the hub what a repository holds.

    Args:
        name: Hub id; what exists on disk, or is no hub id, is not looked for.
        revision: Branch, tag or commit; None means its default branch.
        token: As in `resolve`.

    Returns:
        Its files, or None if this is no hub id or the hub cannot be reached: then `resolve` knows
        more.

    Raises:
        CheckpointError: There is no such repository, or it cannot be had.
    """
    if not is_hub_id(name):
        return None
    from huggingface_hub import HfApi

    try:
        info = HfApi(token=token).model_info(
            name, revision=revision, timeout=_TIMEOUT, files_metadata=True
        )
    except _hub_failures() as failure:
        error = _actual(failure)
        if _is_unreachable(error):
            return None
        raise _Repository(name, revision, token).explained(error) from error
    sizes = {s.rfilename: s.size if type(s.size) is int else 0 for s in info.siblings or []}
    return RemoteFiles(name, sizes, info.sha, token)


def is_hub_id(name: str) -> bool:
    """Whether a name is a hub id: it has the form of one, and nothing on disk is called so."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def model_files(
    names: Iterable[str], source: str, convertible: bool = False, variant: str | None = None
) -> list[str]:
    """Chooses, of the files of a repository, those that one model needs, or those of an adapter.

    Args:
        names: Paths relative to the repository's root.
        source: What to call the repository in messages.
        convertible: Whether TensorFlow's, Flax' and KerasHub's weights will do.
        variant: Part of the names of the weight files, such as "fp16".

    Raises:
        CheckpointError: No configuration, no weights that can be read, or missing shards.
    """
    found = set(names)
    if _ADAPTER[0] in found:
        weights = [name for name in _ADAPTER[1:] if name in found]
        return [_ADAPTER[0], *weights[:1], *(name for name in TOKENIZER_FILES if name in found)]
    if "config.json" not in found:
        raise CheckpointError(f"{source}: no config.json; expected the repository of an OPT model")
    wanted = ["config.json", "generation_config.json", *TOKENIZER_FILES]
    return [name for name in wanted if name in found] + _weight_files(
        found, source, _CONVERTIBLE if convertible and not variant else _WEIGHT_FORMATS, variant
    )


def _weight_files(
    found: set[str], source: str, formats: tuple[tuple[str, str], ...], variant: str | None
) -> list[str]:
    part = f".{variant}" if variant else ""
    for stem, suffix in formats:
        index, single = f"{stem}.{suffix}.index{part}.json", f"{stem}{part}.{suffix}"
        if index in found:
            shards = [
                (name, match[1])
                for name in sorted(found)
                if (match := re.fullmatch(rf"{stem}{part}-\d+-of-(\d+)\.{suffix}", name))
            ]
            expected = int(shards[0][1]) if shards else 1
            if len(shards) != expected:
                raise CheckpointError(
                    f"{source}: {index}: expected {expected} or more shards, found {len(shards)}"
                )
            beside = [SIDE_FILE] if SIDE_FILE in found and suffix == "safetensors" else []
            return [index, *(name for name, _ in shards), *beside]
        if single in found:
            return [single]
    if formats is _CONVERTIBLE and found & set(_KERAS_WEIGHTS):
        if _KERAS_WEIGHTS[0] in found:
            found = {name for name in found if ".weights." not in name}
            return [_KERAS_WEIGHTS[0], *sorted(filter(_KERAS_HUB.fullmatch, found))]
        return sorted(filter(_KERAS_HUB.fullmatch, found))
    if variant:
        raise MissingFileError(f"{source}: no weights of the variant {variant!r}")
    others = sorted(name for name in found if _OTHER_WEIGHTS.fullmatch(name))
    raise CheckpointError(
        f"{source}: no model.safetensors or pytorch_model.bin, "
        + (f"only {', '.join(others)}; convert them first" if others else "no weights at all")
    )


def _mini() -> Path:
    folder = Path(__file__).parent / MINI
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: the embedded model is missing; reinstall the package")
    return folder


@dataclass(frozen=True)
class _Repository:
    name: str
    revision: str | None
    token: str | bool | None
    convertible: bool = False
    subfolder: str = ""
    variant: str | None = None
    download: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def label(self) -> str:
        return self.name if self.revision is None else f"{self.name} (revision {self.revision!r})"

    def fetch(self, files: tuple[str, ...] | None, optional: tuple[str, ...]) -> Path:
        from huggingface_hub import HfApi

        try:
            # list_repo_files would do, but retries for 20 seconds where there is no network.
            api = HfApi(token=self.token)
            info = api.model_info(self.name, revision=self.revision, timeout=_TIMEOUT)
            names = [sibling.rfilename for sibling in info.siblings or []]
            return self.snapshot(self.chosen(names, files, optional, self.label)) / self.subfolder
        except CheckpointError:
            raise
        except _hub_failures() as failure:
            error = _actual(failure)
            if not _is_unreachable(error) or self.download.get("local_dir"):
                raise self.explained(error) from error
            try:
                return self.cached(files, optional)
            except CheckpointError as missing:
                reason = f"the hub cannot be reached ({_first_line(error)})"
                raise CheckpointError(f"{missing}; {reason}") from error

    def chosen(
        self,
        names: Iterable[str],
        files: tuple[str, ...] | None,
        optional: tuple[str, ...],
        source: str,
    ) -> list[str]:
        start = f"{self.subfolder}/" if self.subfolder else ""
        inside = [name.removeprefix(start) for name in names if name.startswith(start)]
        if files is None:
            files = tuple(model_files(inside, source, self.convertible, self.variant))
        if missing := [name for name in files if name not in inside]:
            raise MissingFileError(f"{source}: no {', '.join(missing)}")
        return [*files, *(name for name in optional if name in inside)]

    def cached(self, files: tuple[str, ...] | None, optional: tuple[str, ...]) -> Path:
        advice = "run it once with network access (no HF_HUB_OFFLINE, no local_files_only)"
        try:
            folder = self.snapshot([], local_files_only=True)
        except _hub_failures() as error:
            raise MissingFileError(f"{self.label}: not in the local cache; {advice}") from error
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        try:
            self.chosen(names, files, optional, f"{self.label} in the local cache")
        except CheckpointError as error:
            raise MissingFileError(f"{error}; {advice}") from None
        return folder / self.subfolder

    def snapshot(self, names: list[str], local_files_only: bool = False) -> Path:
        import huggingface_hub

        start = f"{self.subfolder}/" if self.subfolder else ""
        folder = huggingface_hub.snapshot_download(  # pyright: ignore[reportUnknownVariableType,reportUnknownMemberType]
            self.name,
            revision=self.revision,
            token=self.token,
            local_files_only=local_files_only,
            allow_patterns=[start + name for name in names],
            **self.download,
        )
        return Path(str(folder))  # pyright: ignore[reportUnknownArgumentType]

    def explained(self, error: Exception) -> CheckpointError:
        from huggingface_hub import constants, errors

        site, login = constants.ENDPOINT, "pass token= or run `hf auth login`"
        if isinstance(error, errors.GatedRepoError):
            what = f"access is gated; ask for it at {site}/{self.name}, then {login}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            what = f"no such folder, and no such repository on {site}; if it is private, {login}"
        elif isinstance(error, errors.RevisionNotFoundError):
            what = f"the repository has no such revision; see {site}/{self.name}/tree/main"
        elif isinstance(error, errors.LocalTokenNotFoundError):
            what = "token=True, but no token is stored; run `hf auth login`"
        elif isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
            what = f"access denied (HTTP {error.response.status_code}); {login}"
        elif isinstance(error, errors.HFValidationError):
            what = f"no such folder, and not a valid hub id; {_EXPECTED}"
        else:
            what = f"the download failed ({_first_line(error)}); run it again, what came is kept"
        return MissingFileError(f"{self.label}: {what}")


def _hub_failures() -> tuple[type[Exception], ...]:
    """The errors that huggingface_hub raises for the network, the server or the disk."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its releases use different HTTP clients (httpx, then httpx2), whose transport errors share no
    # other base than this; a broken transfer of its own protocol is a bare RuntimeError.
    http = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    # And an answer that is JSON of another kind ends as one of Python's own errors.
    return (*http, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError)


def _actual(error: Exception) -> Exception:
    """The server's own answer, where huggingface_hub says "not found locally" because of it."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return error.__cause__
    return error


def _is_unreachable(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, (_hub_failures()[0], ConnectionError, TimeoutError))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
