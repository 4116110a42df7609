"""A tokenizer made of its parts, by their names in `transformers` and KerasHub."""

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

from opt_core.compatibility.config_keys import near_miss
from opt_core.compatibility.notices import notice
from opt_core.errors import TokenizerError
from opt_core.json_files import read_json
from opt_core.text import tokenizer_files
from opt_core.text.assembly import side
from opt_core.text.tokenizer_files import KEPT, NAMES, LoadedTokenizer
from opt_core.text.vocabulary_files import check_vocabulary, parse_merges, read_merges

_SETTINGS = (
    *NAMES,
    *KEPT,
    "add_bos_token",
    "add_prefix_space",
    "additional_special_tokens",
    "extra_special_tokens",
    "added_tokens_decoder",
)
# Arguments that change nothing here: there is one kind of tokenizer, and nothing is run from files.
_WITHOUT_EFFECT = {
    "clean_up_tokenization_spaces", "config", "do_lower_case", "errors", "force_download",
    "from_slow", "legacy", "mirror", "name", "dtype", "name_or_path", "proxies", "resume_download",
    "tokenizer_class", "tokenizer_type", "trust_remote_code", "unsplittable_tokens", "use_fast",
    "verbose", "_from_auto", "_commit_hash", "use_auth_token", "local_files_only",
}  # fmt: skip


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of tokenizer_config.json among a caller's arguments.

    Raises:
        TokenizerError: There is no such setting.
    """
    for name, value in settings.items():
        if name == "add_eos_token" and value:
            raise TokenizerError("add_eos_token: texts end as they are; append tokenizer.eos_token")
        if name == "add_eos_token":
            continue
        if name in ("padding_side", "truncation_side"):
            side(name, value)
        if name not in _SETTINGS and name not in _WITHOUT_EFFECT:
            if near := near_miss(name, _SETTINGS):
                raise TokenizerError(f"{name}: no setting of a tokenizer; did you mean {near!r}?")
            notice(f"{name}={value!r}: no setting of a tokenizer, without effect")
    return {name: value for name, value in settings.items() if name in _SETTINGS}


def from_parts(vocab: Any, merges: Any, given: Mapping[str, Any]) -> LoadedTokenizer:
    """Makes a tokenizer of a vocabulary and merges, or of the `tokenizers` library's own.

    Args:
        vocab: The id of every token, or a vocab.json.
        merges: Pairs of tokens, or a merges.txt.
        given: The other arguments of `OPTTokenizer`.

    Raises:
        TokenizerError: A part is missing, or they contradict each other.
    """
    settings = dict(given)
    names = (("vocabulary", "vocab_file"), ("merges_file",))
    others = [[settings.pop(name, None) for name in group] for group in names]
    vocab, merges = (
        next((x for x in (first, *rest) if x is not None), None)
        for first, rest in zip((vocab, merges), others, strict=True)
    )
    backend, file = settings.pop("tokenizer_object", None), settings.pop("tokenizer_file", None)
    settings = check_settings(settings)
    if file is not None:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(str(Path(file).read_text(encoding="utf-8")))
    if backend is not None:
        return tokenizer_files.adopt(backend, settings)
    if vocab is None or merges is None:
        raise TokenizerError(
            "a tokenizer needs vocab= and merges=, or tokenizer_object=; from_pretrained reads a "
            "folder"
        )
    source = Path("OPTTokenizer")
    if not isinstance(vocab, Mapping):
        source = Path(vocab)
        vocab = read_json(source, TokenizerError)
    vocabulary = dict(cast("Mapping[str, Any]", vocab))
    check_vocabulary(vocabulary, source)
    if not isinstance(merges, str | PathLike):
        lines = (m if isinstance(m, str) else " ".join(m) for m in cast("Iterable[Any]", merges))
        pairs = parse_merges(lines, vocabulary, Path("merges"))
    else:
        pairs = read_merges(Path(cast("str | PathLike[str]", merges)), vocabulary)
    return tokenizer_files.build(vocabulary, pairs, settings, source)
