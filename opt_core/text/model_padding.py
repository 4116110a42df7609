"""Padding that the model beside a tokenizer has: scripts add a [PAD] and forget the embedding."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from opt_core.errors import ConfigError, TokenizerError
from opt_core.json_files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_DEFAULT = 1  # OPT's own pad_token_id, where config.json says nothing


def pad_as_the_model(folder: Path, backend: "Tokenizer", named: dict[str, str]) -> None:
    """Takes the model's pad token in place of one whose id the model does not have.

    What stands at padding changes no result; an id beyond the embedding would stop the model.

    Args:
        folder: Where the tokenizer's files are, and maybe the model's config.json.
        backend: The tokenizer.
        named: Text of its special tokens; changed in place.

    Raises:
        TokenizerError: The model has no pad token that the tokenizer has too.
    """
    path = folder / "config.json"
    token = backend.token_to_id(named.get("pad_token", ""))
    if token is None or not path.is_file():
        return
    try:
        values = read_json(path)
    except ConfigError:  # which is for the model to say
        return
    rows, own = values.get("vocab_size"), values.get("pad_token_id", _DEFAULT)
    if type(rows) is not int or token < rows:
        return
    what = (
        f"{folder / 'tokenizer_config.json'}: pad_token {named['pad_token']!r} has id {token}, but "
        f"{path} has vocab_size={rows}"
    )
    text = backend.id_to_token(own) if type(own) is int and 0 <= own < rows else None
    if text is None:
        raise TokenizerError(f"{what} and no pad_token_id in place of it: set one")
    warnings.warn(f"{what}: padding is the model's own {text!r}, id {own}", stacklevel=5)
    named["pad_token"] = text
