"""Reads and writes a tokenizer's files, as `transformers` reads and writes them.

Fail-closed: files that contradict one another, or ask for what this project does not do, raise.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from opt_core.errors import TokenizerError
from opt_core.json_files import read_json, write_json
from opt_core.text.model_padding import pad_as_the_model

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
# OPT's own, for vocab.json with merges.txt; and those of Galactica's bare tokenizer.json, which are
# taken only where its vocabulary has them. Files that name others come first.
_OPT_TOKENS = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
_USUAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}
_ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class LoadedTokenizer:
    """The contents of a tokenizer's files.

    Attributes:
        backend: The byte-level BPE itself, without padding or truncation.
        named: Text of the special tokens called `NAMES`, those that there are.
        add_bos: Whether a text starts with the beginning-of-text token.
        source: Folder the files were read from, for messages.
    """

    backend: "Tokenizer"
    named: dict[str, str]
    add_bos: bool
    source: Path


def load(folder: Path) -> LoadedTokenizer:
    """Reads a tokenizer from vocab.json with merges.txt, or from tokenizer.json.

    Where both are there tokenizer.json is read, as in `transformers`: it alone holds everything a
    fine-tune added. A vocab.json beside it that gives a token another id is an error, because one
    of the two is stale.

    Args:
        folder: Where the files are.

    Raises:
        TokenizerError: A file is missing or damaged, contradicts another one, or describes no
            byte-level BPE.
    """
    settings = _settings(folder)
    if (folder / "tokenizer.json").is_file():
        backend = _read_tokenizer_json(folder, settings)
        defaults = {k: v for k, v in _USUAL_TOKENS.items() if backend.token_to_id(v) is not None}
        add_bos = None
    else:
        backend = _read_vocab_and_merges(folder, settings)
        defaults, add_bos = _OPT_TOKENS, True
    given = {
        name: _text(settings[name], folder) for name in NAMES if settings.get(name) is not None
    }
    first = _prepended(backend, folder)
    if settings.get("add_bos_token", add_bos) is None and first is not None:
        if given.get("bos_token", first) != first:
            raise TokenizerError(
                f"{folder / 'tokenizer.json'}: texts start with {first!r}, but bos_token is "
                f"{given['bos_token']!r}; set add_bos_token in tokenizer_config.json"
            )
        given["bos_token"], add_bos = first, True
    named = {**defaults, **given}
    _add_tokens(backend, folder, settings, named)
    pad_as_the_model(folder, backend, named)
    add_bos = bool(settings.get("add_bos_token", add_bos))
    if add_bos and "bos_token" not in named:
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: add_bos_token is true, but there is no bos_token"
        )
    return LoadedTokenizer(backend, named, add_bos, folder)


def save(tokenizer: LoadedTokenizer, folder: Path) -> None:
    """Writes the files that `transformers`, and tools that know tokenizer.json alone, read.

    Args:
        tokenizer: What to write.
        folder: Where to; made if missing. vocab.json and merges.txt are written only when they say
            everything, which they cannot for a tokenizer with rules of its own (Galactica's).
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    backend, named = Tokenizer.from_str(tokenizer.backend.to_str()), tokenizer.named
    if tokenizer.add_bos:
        bos = named["bos_token"]
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    contents: dict[str, Any] = json.loads(backend.to_str())
    plain = _is_plain(contents)
    write_json(folder / "tokenizer.json", contents)
    if plain:
        write_json(folder / "vocab.json", contents["model"]["vocab"])
        _write_merges(folder / "merges.txt", contents["model"]["merges"])
    added = {str(token.pop("id")): token for token in contents["added_tokens"]}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer" if plain else "PreTrainedTokenizerFast",
            **named,
            "add_bos_token": tokenizer.add_bos,
            "add_prefix_space": plain and contents["pre_tokenizer"]["add_prefix_space"],
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "added_tokens_decoder": added,
        },
    )
    write_json(folder / "special_tokens_map.json", named)


def _is_plain(contents: Mapping[str, Any]) -> bool:
    split, model = _object(contents["pre_tokenizer"]), contents["model"]
    return bool(
        contents["normalizer"] is None
        and split.get("type") == "ByteLevel"
        and split.get("use_regex", True)
        and not (model["dropout"] or model["ignore_merges"] or model["byte_fallback"])
    )


def _write_merges(path: Path, merges: list[Any]) -> None:
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    part = path.with_name(f".{path.name}.tmp")
    part.write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    part.replace(path)


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with what older versions wrote to special_tokens_map.json."""
    path, older = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    settings = read_json(path, TokenizerError) if path.is_file() else {}
    if "added_tokens_decoder" not in settings and older.is_file():
        settings |= read_json(older, TokenizerError)
    for key in ("add_eos_token", "split_special_tokens"):
        if settings.get(key):
            raise TokenizerError(
                f"{path}: {key}={settings[key]!r} is not supported; expected false"
            )
    for key in ("add_bos_token", "add_prefix_space"):
        if not isinstance(settings.get(key, False), bool):
            raise TokenizerError(
                f"{path}: {key}: expected true or false, received {settings[key]!r}"
            )
    return settings


def _read_tokenizer_json(folder: Path, settings: Mapping[str, Any]) -> "Tokenizer":
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    contents = read_json(path, TokenizerError)
    kinds = [_object(contents.get(name)).get("type") for name in ("model", "decoder")]
    if kinds != ["BPE", "ByteLevel"]:
        raise TokenizerError(
            f"{path}: expected a BPE model and a ByteLevel decoder, received {kinds[0]}, {kinds[1]}"
        )
    try:
        backend = Tokenizer.from_str(json.dumps(contents))
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{path}: not a tokenizer: {error}") from None
    backend.no_padding()
    backend.no_truncation()
    for token in contents.get("added_tokens", []):
        _check_id(backend, token["content"], token["id"], path)
    if (folder / "vocab.json").is_file():
        for token, index in read_json(folder / "vocab.json", TokenizerError).items():
            _check_id(backend, token, index, folder / "vocab.json")
    wanted = settings.get("add_prefix_space")
    split = _object(contents.get("pre_tokenizer"))
    if wanted is not None and split.get("type") == "ByteLevel":
        backend.pre_tokenizer.add_prefix_space = wanted
    elif wanted:
        raise TokenizerError(f"{path}: add_prefix_space=true needs a ByteLevel pre-tokenizer")
    return backend


def _read_vocab_and_merges(folder: Path, settings: Mapping[str, Any]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    for name, other in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")):
        if not (folder / name).is_file():
            beside = f" beside {other}" if (folder / other).is_file() else " and no tokenizer.json"
            raise TokenizerError(f"{folder}: no {name}{beside}; expected both, or tokenizer.json")
    vocabulary = read_json(folder / "vocab.json", TokenizerError)
    _check_vocabulary(vocabulary, folder / "vocab.json")
    merges = _read_merges(folder / "merges.txt", vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(settings.get("add_prefix_space"))
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _check_vocabulary(vocabulary: Mapping[str, Any], path: Path) -> None:
    seen: dict[int, str] = {}
    for token, index in vocabulary.items():
        if type(index) is not int or not 0 <= index < 2**31:
            raise TokenizerError(f"{path}: {token!r}: expected an id >= 0, received {index!r}")
        if index in seen:
            raise TokenizerError(
                f"{path}: id {index} belongs to both {seen[index]!r} and {token!r}"
            )
        seen[index] = token
    if not seen:
        raise TokenizerError(f"{path}: no tokens")


def _read_merges(path: Path, vocabulary: Mapping[str, Any]) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: not readable as text: {error}") from None
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if line.startswith("#version") or not line.strip():
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if not left or not right or " " in right:
            raise TokenizerError(f"{path}: line {number}: expected two tokens, received {line!r}")
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise TokenizerError(f"{path}: line {number}: {token!r} is not in vocab.json")
        merges.append((left, right))
    if not merges:
        raise TokenizerError(f"{path}: no merges; the file is empty or cut short")
    return merges


def _prepended(backend: "Tokenizer", folder: Path) -> str | None:
    """The token that a tokenizer.json puts before every text, from what it does to one."""
    with_special = backend.encode("a", add_special_tokens=True).ids
    bare = backend.encode("a", add_special_tokens=False).ids
    extra = len(with_special) - len(bare)
    if extra > 1 or with_special[extra:] != bare:
        raise TokenizerError(
            f"{folder / 'tokenizer.json'}: its post-processor makes {with_special} of {bare}; "
            "expected at most one token before the text"
        )
    return backend.id_to_token(with_special[0]) if extra else None


def _object(value: Any) -> dict[str, Any]:
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _text(token: Any, folder: Path) -> str:
    text = _object(token).get("content", token)
    if not isinstance(text, str) or not text:
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: expected a token, received {token!r}"
        )
    return text


def _added_token(token: Any, folder: Path, *, special: bool) -> "AddedToken":
    from tokenizers import AddedToken

    flags = {"special": special, "normalized": not special}
    flags |= {name: bool(flag) for name, flag in _object(token).items() if name in _ADDED_FLAGS}
    return AddedToken(_text(token, folder), **flags)


def _add_tokens(
    backend: "Tokenizer", folder: Path, settings: Mapping[str, Any], named: Mapping[str, str]
) -> None:
    """Makes the tokens that the files list as added, or as special, known to the backend."""
    extra: Any = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    if not isinstance(extra, list | dict | None):
        path = folder / "tokenizer_config.json"
        raise TokenizerError(f"{path}: extra_special_tokens: expected a list, received {extra!r}")
    listed: list[Any] = [settings.get(name) or text for name, text in named.items()]
    listed += [v for k, v in settings.items() if k.endswith("_token") and isinstance(v, str | dict)]
    listed += _object(extra).values() if isinstance(extra, dict) else cast(list[Any], extra or [])
    special = {_text(token, folder): token for token in listed}
    for index, token, path in _listed_as_added(folder, settings, special):
        text = _text(token, folder)
        backend.add_tokens(  # pyright: ignore[reportUnknownMemberType]
            [_added_token(token, folder, special=text in special)]
        )
        _check_id(backend, text, index, path)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for text, token in special.items():
        if backend.token_to_id(text) is None:
            raise TokenizerError(
                f"{folder}: the special token {text!r} has no id in the vocabulary; expected it in "
                "vocab.json, tokenizer.json or added_tokens.json"
            )
        if text not in known:
            backend.add_special_tokens(  # pyright: ignore[reportUnknownMemberType]
                [_added_token(token, folder, special=True)]
            )


def _listed_as_added(
    folder: Path, settings: Mapping[str, Any], special: Mapping[str, Any]
) -> list[tuple[int, Any, Path]]:
    """Ids, tokens and the file that lists them, in the order of the ids."""
    path = folder / "tokenizer_config.json"
    if "added_tokens_decoder" in settings:
        entries: list[tuple[Any, Any]] = list(_object(settings["added_tokens_decoder"]).items())
    else:
        path = folder / "added_tokens.json"
        older = read_json(path, TokenizerError) if path.is_file() else {}
        entries = [(index, special.get(text, text)) for text, index in older.items()]
    try:
        return sorted(((int(index), token, path) for index, token in entries), key=lambda e: e[0])
    except (TypeError, ValueError):
        raise TokenizerError(f"{path}: added tokens: expected integer ids") from None


def _check_id(backend: "Tokenizer", token: str, index: Any, path: Path) -> None:
    if backend.token_to_id(token) != index:
        raise TokenizerError(
            f"{path}: {token!r} has id {index!r}, but {backend.token_to_id(token)} by the other "
            "files; one of them is stale"
        )
