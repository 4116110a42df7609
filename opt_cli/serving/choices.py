"""The texts of a request as they grow: pieces of text, and the tokens' probabilities with them."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple

from opt_cli.serving.errors import Refusal
from opt_cli.serving.fields import Job
from opt_cli.serving.text import TextPieces, token_text
from opt_cli.serving.worker import Worker
from opt_core.serving.row import Row, TokenScores
from opt_core.serving.scheduler import Event


class Token(NamedTuple):
    """A token of an answer.

    Attributes:
        text: As OpenAI's API writes it.
        logprob: Its log-probability; None for the first of a prompt.
        best: The likeliest tokens at its place, each with its log-probability.
        offset: Characters of the answer before it.
    """

    text: str
    logprob: float | None
    best: list[tuple[str, float]]
    offset: int


class Piece(NamedTuple):
    """More of a text.

    Attributes:
        index: Which of the texts.
        text: What is added to it.
        tokens: The tokens of that, where probabilities are wanted.
        finish_reason: "stop" or "length", with the last piece; None before.
    """

    index: int
    text: str
    tokens: list[Token]
    finish_reason: str | None


class _Choice:
    def __init__(self, job: Job, worker: Worker, row: Row, index: int) -> None:
        self.job, self.worker, self.row, self.index = job, worker, row, index
        self.pieces, self.count, self.before = TextPieces(worker.tokenizer, job.stops), 0, 0
        self.has_begun = False

    def take(self, event: Event) -> Piece:
        """The piece of a row's next token, and before the first what the prompt is echoed as."""
        text, tokens = self._prompt() if self.job.is_echoed and not self.has_begun else ("", [])
        self.has_begun = True
        if event.token is not None and not self.job.is_empty:
            start = self.pieces.length
            text += self.pieces.push(event.token)
            self.count += 1
            # A token of nothing but the stop string is no part of the answer.
            if not self.pieces.is_cut or start < self.pieces.length:
                tokens += self._tokens(event.token, event.scores, self.before + start)
        if event.ended is not None:
            text += self.pieces.flush()
        return Piece(self.index, text, tokens, "length" if self.job.is_empty else event.ended)

    def _prompt(self) -> tuple[str, list[Token]]:
        echo, text, tokens = TextPieces(self.worker.tokenizer), "", list[Token]()
        scores = [None, *self.row.prompt_scores] if self.job.logprobs is not None else []
        for place, token in enumerate(self.row.prompt):
            offset = echo.length
            text += echo.push(token)
            if scores:
                tokens += self._tokens(token, scores[place], offset)
        text += echo.flush()
        self.before = len(text)
        return text, tokens

    def _tokens(self, token: int, scores: TokenScores | None, offset: int) -> list[Token]:
        if self.job.logprobs is None:
            return []
        shown = token_text(self.worker.tokenizer, token)
        if scores is None:
            return [Token(shown, None, [], offset)]
        names = [token_text(self.worker.tokenizer, i) for i in scores.ids[: self.job.logprobs]]
        best = list(zip(names, scores.logprobs, strict=False))
        return [Token(shown, scores.logprob, best, offset)]


class Choices:
    """The texts of a request, which `close` must follow.

    Args:
        job: The request.
        worker: Its model.

    Raises:
        Refusal: There is no room for them.
    """

    def __init__(self, job: Job, worker: Worker) -> None:
        self.job, self.worker = job, worker
        self._choices = {row: _Choice(job, worker, row, i) for i, row in enumerate(job.rows)}
        worker.enter(job.rows)

    def close(self) -> None:
        """Ends what has not ended."""
        self.worker.leave(self.job.rows)

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The pieces that are added to the texts, as they are made.

        Raises:
            Refusal: A row could not be finished: the model failed, or the server stops.
        """
        async with aclosing(self.worker.events(self.job.rows)) as events:
            async for event in events:
                if event.ended == "cancelled":
                    raise Refusal(event.row.error or "the request was cancelled", None, 503)
                if event.ended == "error":
                    raise Refusal(event.row.error or "the model failed", None, 500)
                yield self._choices[event.row].take(event)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens that were read and written; a prompt counts once, however many texts it has."""
        prompt = sum(len(row.prompt) for row in self.job.rows[:: self.job.choices])
        made = sum(choice.count for choice in self._choices.values())
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def logprobs_of(tokens: list[Token]) -> dict[str, Any]:
    """Probabilities as /v1/completions gives them."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else {**dict(token.best), token.text: token.logprob}
            for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }  # fmt: skip
