"""Text to ids and back, whole or one token at a time."""

from typing import TYPE_CHECKING

from opt_core.lazy_names import lazy_names

if TYPE_CHECKING:
    from opt_core.text.adapter import as_tokenizer
    from opt_core.text.detokenizer import Detokenizer, StopStringTracker
    from opt_core.text.encoding import Encoding
    from opt_core.text.tokenizer import OPTTokenizer

__all__ = ["Detokenizer", "Encoding", "OPTTokenizer", "StopStringTracker", "as_tokenizer"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "adapter": ["as_tokenizer"],
        "detokenizer": ["Detokenizer", "StopStringTracker"],
        "encoding": ["Encoding"],
        "tokenizer": ["OPTTokenizer"],
    },
)
