"""A model for EleutherAI's `lm-eval`, so that its tasks run on any backend.

Needs the extra `lm-eval`; nothing else in this package imports this module. Sums of
log-likelihoods and texts are computed by what the project's own evaluation uses.
"""
# pyright: basic, reportMissingImports=false
# The library is not there where types are checked.

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from numpy.typing import NDArray

from opt_core.errors import InputError
from opt_core.evaluation.perplexity import TokenScores, score_continuations, score_text
from opt_core.text.adapter import as_tokenizer
from opt_core.text.tokenizer import OPTTokenizer

Generate = Callable[..., Any]
"""`model.generate` of any backend."""

_NEW_TOKENS = 256
"""Tokens that `lm-eval` generates where a task does not say how many."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p")


class HarnessLM(LM):
    """An OPT behind `lm-eval`'s interface.

    Rows begin with the token OPT's texts begin with and hold `window` tokens, the last one
    included; longer contexts lose their beginning.

    Args:
        token_scores: `opt_*.scoring.token_scores`, its first argument bound to the model.
        generate: The model's `generate`.
        tokenizer: The model's.
        window: The model's `max_position_embeddings`.
        batch_size: Rows at a time.
    """

    def __init__(
        self,
        token_scores: TokenScores,
        generate: Generate,
        tokenizer: OPTTokenizer,
        window: int,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        self._token_scores, self._generate = token_scores, generate
        self.tokenizer = as_tokenizer(tokenizer)
        self._window, self._batch_size = window, batch_size

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation of a context, and whether it is the greedy one.

        Args:
            requests: `lm-eval`'s instances, their `args` (context, continuation).
        """
        pairs = [request.args for request in requests]
        found = score_continuations(
            self._token_scores, self.tokenizer, pairs, self._window, self._batch_size
        )
        results = [(one.log_likelihood, one.is_greedy) for one in found]
        for pair, result in zip(pairs, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-likelihood of each text as a whole, its first token included.

        Every token is predicted once; the last row of a long text has as much context as fits.

        Args:
            requests: `lm-eval`'s instances, their `args` (text,).
        """
        results: list[float] = []
        for request in requests:
            (text,) = request.args
            results.append(
                score_text(self._token_scores, self.tokenizer, text, self._window, self._batch_size)
            )
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), results[-1])
        return results

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The text that follows each context, up to the first of its stop strings.

        Args:
            requests: `lm-eval`'s instances, their `args` (context, settings): `until`,
                `max_gen_toks`, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`.
        """
        results: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        for group in groups.values():
            settings, stops = _settings(requests[group[0]].args[1])
            room = self._window - settings["max_new_tokens"]
            if room < 1:
                raise InputError(
                    f"max_gen_toks={settings['max_new_tokens']}: expected less than the model's "
                    f"{self._window} positions"
                )
            rows = {i: self.tokenizer.encode(requests[i].args[0])[-room:] for i in group}
            group.sort(key=lambda i: -len(rows[i]))
            for start in range(0, len(group), self._batch_size):
                batch = group[start : start + self._batch_size]
                texts = self._written([rows[i] for i in batch], settings, stops)
                results.update(zip(batch, texts, strict=True))
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, results[i])
        return [results[i] for i in range(len(requests))]

    def _written(
        self, rows: list[list[int]], settings: dict[str, Any], stops: list[str]
    ) -> list[str]:
        width = max(map(len, rows))
        ids = np.ones((len(rows), width), np.int32)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
        if stops:
            settings = {**settings, "stop_strings": stops, "tokenizer": self.tokenizer}
        made: NDArray[Any] = np.asarray(self._generate(ids, attention_mask=mask, **settings))
        texts = self.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        return [_before(text, stops) for text in texts]


def _settings(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A task's settings as ours, and its stop strings.

    Raises:
        InputError: A setting that we do not know, so that it is not passed over.
    """
    unknown = sorted(given.keys() - {*_LENGTHS, *_SAMPLING, "until"})
    if unknown:
        raise InputError(f"generate_until: settings that are not known: {', '.join(unknown)}")
    until = given.get("until") or []
    stops = [until] if isinstance(until, str) else [*until]
    lengths = [given[name] for name in _LENGTHS if given.get(name) is not None]
    settings: dict[str, Any] = {"max_new_tokens": int(lengths[0]) if lengths else _NEW_TOKENS}
    temperature = given.get("temperature")
    settings["do_sample"] = bool(given.get("do_sample", temperature)) and temperature != 0
    if settings["do_sample"]:
        settings |= {k: given[k] for k in _SAMPLING[1:] if given.get(k) is not None}
    return settings, [stop for stop in stops if stop]


def _before(text: str, stops: list[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text
