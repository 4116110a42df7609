"""A row's ids as text, piece by piece: nothing is shown that a stop string may still take back."""

from opt_core.errors import TokenizerError
from opt_core.text.detokenizer import Detokenizer
from opt_core.text.tokenizer import OPTTokenizer


class TextPieces:
    """The text of one answer.

    Args:
        tokenizer: Whose ids they are.
        stops: Strings that end the text and are no part of it.

    Attributes:
        length: Characters of what was generated, as far as they are certain.
        is_cut: Whether a stop string was found.
    """

    def __init__(self, tokenizer: OPTTokenizer, stops: tuple[str, ...] = ()) -> None:
        self._detokenizer, self._stops = Detokenizer(tokenizer), stops
        self._kept, self.length, self.is_cut = "", 0, False

    def push(self, token: int) -> str:
        """Takes the next id; returns the text that is now certain."""
        return self._add(self._detokenizer.push(token), is_last=False)

    def flush(self) -> str:
        """The rest of the text, at its end."""
        return self._add(self._detokenizer.flush(), is_last=True)

    def _add(self, piece: str, is_last: bool) -> str:
        if self.is_cut:
            return ""
        text = self._kept + piece
        self.length += len(piece)
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.is_cut, self._kept = True, ""
            self.length -= len(text) - min(places)
            return text[: min(places)]
        keep = 0 if is_last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._kept = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string begins with."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def token_text(tokenizer: OPTTokenizer, token: int) -> str:
    r"""A token as OpenAI's API writes it: its text, or "bytes:\xe2\x82" where that is none.

    Ids that no token has, rows of the embedding that were never trained, are written as "<50265>".
    """
    try:
        raw = tokenizer.token_bytes(token, skip_special_tokens=False)
    except TokenizerError:
        return f"<{token}>"
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
