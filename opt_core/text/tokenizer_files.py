"""Reads and writes a tokenizer's files, as `transformers` reads and writes them.

Fail-closed: files that contradict one another, or ask for what this project does not do, raise.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from opt_core.errors import TokenizerError
from opt_core.json_files import read_json, write_json
from opt_core.text.assembly import begin_with
from opt_core.text.model_padding import pad_as_the_model
from opt_core.text.vocabulary_files import check_vocabulary, read_merges, write_merges

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# OPT's own and GPT-2's, for vocab.json with merges.txt; and those of Galactica's bare
# tokenizer.json. Taken only where the vocabulary has them; files that name others come first.
_OPT_TOKENS = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
_GPT2_TOKENS: dict[str, str] = dict.fromkeys(NAMES[:3], "<|endoftext|>")
_USUAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}
_ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
KEPT = ("model_max_length", "padding_side", "truncation_side", "chat_template")
"""Entries of tokenizer_config.json that decide no id."""


@dataclass
class LoadedTokenizer:
    """The contents of a tokenizer's files.

    Attributes:
        backend: The byte-level BPE itself, without padding or truncation.
        named: Text of the special tokens called `NAMES`, those that there are, and of others that
            the files or the caller name, such as `image_token`.
        add_bos: Whether a text starts with the beginning-of-text token.
        source: Folder the files were read from, for messages.
        extra: Special tokens without a name.
        kept: The settings called `KEPT`, those that there are.
    """

    backend: "Tokenizer"
    named: dict[str, str]
    add_bos: bool
    source: Path
    extra: list[str] = field(default_factory=list[str])
    kept: dict[str, Any] = field(default_factory=dict[str, Any])


def load(folder: Path, **changes: Any) -> LoadedTokenizer:
    """Reads a tokenizer from vocab.json with merges.txt, or from tokenizer.json.

    Where both are there tokenizer.json is read, as in `transformers`: it alone holds everything a
    fine-tune added. A vocab.json beside it that gives a token another id is an error, because one
    of the two is stale.

    Args:
        folder: Where the files are.
        **changes: Entries of tokenizer_config.json to take in place of the file's. A special token
            that the vocabulary lacks gets the next id.

    Raises:
        TokenizerError: A file is missing or damaged, contradicts another one, or describes no
            byte-level BPE.
    """
    settings = _settings(folder, changes)
    if (folder / "tokenizer.json").is_file():
        backend = _read_tokenizer_json(folder, settings)
        loaded = _finish(backend, folder, settings, _USUAL_TOKENS, None)
    else:
        loaded = build(*_read_vocab_and_merges(folder), settings, folder)
    if "pad_token" not in changes:  # who names one will resize the model
        pad_as_the_model(folder, loaded.backend, loaded.named)
    return loaded


def build(
    vocabulary: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    settings: Mapping[str, Any],
    source: Path,
) -> LoadedTokenizer:
    """Makes a tokenizer of a vocabulary and merges.

    Args:
        vocabulary: The id of every token.
        merges: Pairs of tokens, the first ones first.
        settings: Entries of tokenizer_config.json.
        source: Where they are from, for messages.

    Raises:
        TokenizerError: They contradict each other.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(settings.get("add_prefix_space"))
    )
    backend.decoder = decoders.ByteLevel()
    is_opt = "</s>" in vocabulary
    return _finish(
        backend, source, settings, _OPT_TOKENS if is_opt else _GPT2_TOKENS, is_opt or None
    )


def adopt(backend: "Tokenizer", settings: Mapping[str, Any], source: str = "") -> LoadedTokenizer:
    """Makes a tokenizer of a copy of the library's own.

    Args:
        backend: A byte-level BPE.
        settings: Entries of tokenizer_config.json.
        source: What to call it in messages.

    Raises:
        TokenizerError: It is of another kind.
    """
    from tokenizers import Tokenizer

    place, text = Path(source or "tokenizer_object"), backend.to_str()
    _check_kind(json.loads(text), place)
    copy = Tokenizer.from_str(text)
    copy.no_padding()
    copy.no_truncation()
    return _finish(copy, place, settings, _USUAL_TOKENS, None)


def _finish(
    backend: "Tokenizer",
    folder: Path,
    settings: Mapping[str, Any],
    usual: Mapping[str, str],
    add_bos: bool | None,
) -> LoadedTokenizer:
    """Special and added tokens, by the files or else as usual where the vocabulary has those."""
    defaults = {k: v for k, v in usual.items() if backend.token_to_id(v) is not None}
    given = {
        name: token_text(settings[name], folder / "tokenizer_config.json")
        for name in NAMES
        if settings.get(name) is not None
    }
    given |= _own_names(settings, folder)
    first = _prepended(backend, folder)
    if settings.get("add_bos_token", add_bos) is None and first is not None:
        if given.get("bos_token", first) != first:
            raise TokenizerError(
                f"{folder / 'tokenizer.json'}: texts start with {first!r}, but bos_token is "
                f"{given['bos_token']!r}; set add_bos_token in tokenizer_config.json"
            )
        given["bos_token"], add_bos = first, True
    named = {k: v for k, v in {**defaults, **given}.items() if k in given or k not in settings}
    extra = _add_tokens(backend, folder, settings, named)
    add_bos = bool(settings.get("add_bos_token", add_bos))
    if add_bos and "bos_token" not in named:
        if settings.get("add_bos_token"):
            path = folder / "tokenizer_config.json"
            raise TokenizerError(f"{path}: add_bos_token is true, but there is no bos_token")
        add_bos = False
    kept = {name: settings[name] for name in KEPT if settings.get(name) is not None}
    return LoadedTokenizer(backend, named, add_bos, folder, extra, kept)


def _own_names(settings: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Special tokens by names of their own, as multimodal models have them."""
    entries: dict[str, Any] = {
        k: v for k, v in settings.items() if k.endswith("_token") and isinstance(v, str | dict)
    }
    entries |= _object(settings.get("extra_special_tokens"))
    path = folder / "tokenizer_config.json"
    return {name: token_text(token, path) for name, token in entries.items() if name not in NAMES}


def save(tokenizer: LoadedTokenizer, folder: Path) -> None:
    """Writes the files that `transformers`, and tools that know tokenizer.json alone, read.

    Args:
        tokenizer: What to write.
        folder: Where to; made if missing. vocab.json and merges.txt are written only when they say
            everything, which they cannot for a tokenizer with rules of its own (Galactica's).
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    named = {name: text for name, text in tokenizer.named.items() if name in NAMES}
    own = {name: text for name, text in tokenizer.named.items() if name not in NAMES}
    bos = named.get("bos_token")
    bos_id = None if bos is None else backend.token_to_id(bos)
    if tokenizer.add_bos and bos is not None and bos_id is not None:
        backend.post_processor = begin_with(bos, bos_id)
    contents: dict[str, Any] = json.loads(backend.to_str())
    plain = _is_plain(contents)
    write_json(folder / "tokenizer.json", contents)
    if plain:
        write_json(folder / "vocab.json", contents["model"]["vocab"])
        write_merges(folder / "merges.txt", contents["model"]["merges"])
    added = {str(token.pop("id")): token for token in contents["added_tokens"]}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer" if plain else "PreTrainedTokenizerFast",
            **named,
            **({"additional_special_tokens": tokenizer.extra} if tokenizer.extra else {}),
            **({"extra_special_tokens": own} if own else {}),
            **tokenizer.kept,
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


def _settings(folder: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, with what older versions wrote to special_tokens_map.json."""
    path, older = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    settings = read_json(path, TokenizerError) if path.is_file() else {}
    if "added_tokens_decoder" not in settings and older.is_file():
        settings |= read_json(older, TokenizerError)
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    settings |= changes
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
    _check_kind(contents, path)
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


def _check_kind(contents: Mapping[str, Any], path: Path) -> None:
    kinds = [_object(contents.get(name)).get("type") for name in ("model", "decoder")]
    if kinds != ["BPE", "ByteLevel"]:
        raise TokenizerError(
            f"{path}: expected a BPE model and a ByteLevel decoder, received {kinds[0]}, {kinds[1]}"
        )


def _read_vocab_and_merges(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    for name, other in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")):
        if not (folder / name).is_file():
            beside = f" beside {other}" if (folder / other).is_file() else " and no tokenizer.json"
            raise TokenizerError(f"{folder}: no {name}{beside}; expected both, or tokenizer.json")
    vocabulary = read_json(folder / "vocab.json", TokenizerError)
    check_vocabulary(vocabulary, folder / "vocab.json")
    return vocabulary, read_merges(folder / "merges.txt", vocabulary)


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


def token_text(token: Any, place: object) -> str:
    """The text of a token: a string, an entry of a file, or the library's `AddedToken`.

    Raises:
        TokenizerError: It is none of them.
    """
    text = _object(token).get("content", getattr(token, "content", token))
    if not isinstance(text, str) or not text:
        raise TokenizerError(f"{place}: expected a token, received {token!r}")
    return text


def _added_token(token: Any, folder: Path, *, special: bool) -> "AddedToken":
    from tokenizers import AddedToken

    flags = {"special": special, "normalized": not special}
    flags |= {name: bool(flag) for name, flag in _object(token).items() if name in _ADDED_FLAGS}
    return AddedToken(token_text(token, folder / "tokenizer_config.json"), **flags)


def _add_tokens(
    backend: "Tokenizer", folder: Path, settings: Mapping[str, Any], named: Mapping[str, str]
) -> list[str]:
    """Makes the tokens that the files list as added, or as special, known to the backend.

    Returns:
        The special ones that have no name.
    """
    listed: list[Any] = [settings.get(name) or text for name, text in named.items()]
    listed += [v for k, v in settings.items() if k.endswith("_token") and isinstance(v, str | dict)]
    for name in ("extra_special_tokens", "additional_special_tokens"):
        extra: Any = settings.get(name) or []
        if not isinstance(extra, list | dict):
            path = folder / "tokenizer_config.json"
            raise TokenizerError(f"{path}: {name}: expected a list, received {extra!r}")
        listed += _object(extra).values() if isinstance(extra, dict) else cast(list[Any], extra)
    special = {token_text(token, folder / "tokenizer_config.json"): token for token in listed}
    for index, token, path in _listed_as_added(folder, settings, special):
        text = token_text(token, folder / "tokenizer_config.json")
        backend.add_tokens(  # pyright: ignore[reportUnknownMemberType]
            [_added_token(token, folder, special=text in special)]
        )
        _check_id(backend, text, index, path)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for text, token in special.items():
        if text not in known:  # without an id it gets the next one, as in transformers
            backend.add_special_tokens(  # pyright: ignore[reportUnknownMemberType]
                [_added_token(token, folder, special=True)]
            )
    return [text for text in special if text not in named.values()]


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
