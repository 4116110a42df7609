"""Text to ids and back, whole or one token at a time."""

from opt_core.text.detokenizer import Detokenizer, StopStringTracker
from opt_core.text.tokenizer import Encoding, OPTTokenizer

__all__ = ["Detokenizer", "Encoding", "OPTTokenizer", "StopStringTracker"]
