"""Tokenizers of `transformers`, wherever a tokenizer of this project is taken."""

import tempfile
from typing import Any
from weakref import WeakKeyDictionary

from opt_core.errors import TokenizerError
from opt_core.text.tokenizer import OPTTokenizer
from opt_core.text.tokenizer_files import NAMES, adopt

_known: WeakKeyDictionary[Any, tuple[int, OPTTokenizer]] = WeakKeyDictionary()


def as_tokenizer(tokenizer: Any) -> OPTTokenizer:
    """The tokenizer itself, or one with the same ids.

    Args:
        tokenizer: An `OPTTokenizer`, or what `transformers`' `AutoTokenizer` gives for OPT,
            Galactica or GPT-2: known by what it can do, without `transformers` itself.

    Raises:
        TokenizerError: It is something else.
    """
    if isinstance(tokenizer, OPTTokenizer):
        return tokenizer
    if not hasattr(tokenizer, "save_pretrained") or not hasattr(tokenizer, "decode"):
        raise TokenizerError(
            f"tokenizer: expected an OPTTokenizer, or one of transformers', received "
            f"{type(tokenizer).__name__}"
        )
    size = len(tokenizer)  # tokens may have been added since
    known = _known.get(tokenizer)
    if known is None or known[0] != size:
        known = _known[tokenizer] = (size, _translated(tokenizer))
    made = known[1]
    for name in ("padding_side", "truncation_side", *NAMES):  # these may have been set
        if (value := getattr(tokenizer, name, None)) != getattr(made, name):
            setattr(made, name, value)
    return made


def _translated(tokenizer: Any) -> OPTTokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # transformers 4's tokenizers in Python
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return OPTTokenizer.from_pretrained(folder)
    names = (*NAMES, "additional_special_tokens", "extra_special_tokens")
    settings = {name: getattr(tokenizer, name, None) for name in names}
    name = str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    return OPTTokenizer.from_loaded(adopt(backend, settings, name))
