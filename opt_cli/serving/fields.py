"""Bodies of requests: fields that are honoured, fields that ask for nothing, and no others."""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opt_cli.serving.errors import Refusal
from opt_cli.serving.worker import Worker
from opt_core.errors import OPTError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.mixin import make_request
from opt_core.serving.engine import ALTERNATIVES
from opt_core.serving.row import Row

MOST_CHOICES = 128
"""Texts of one prompt, as many as OpenAI's API gives."""
MOST_STOPS = 4
MOST_BIASED = 300
_SEEDS = 2**63
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")


@dataclass(frozen=True)
class Job:
    """The texts that a request asks for.

    Attributes:
        rows: A row of each text, those of one prompt side by side.
        choices: Texts of each prompt.
        stops: Strings that end a text.
        logprobs: How many alternatives of each token are named; None: no probabilities.
        is_streamed: Whether tokens are sent as they are made.
        has_usage: Whether a stream ends with how many tokens there were.
        is_echoed: Whether the prompt is part of a text.
        is_empty: Whether nothing is to be written behind the prompt.
    """

    rows: list[Row]
    choices: int = 1
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    is_streamed: bool = False
    has_usage: bool = False
    is_echoed: bool = False
    is_empty: bool = False


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body is.

    Raises:
        Refusal: It is none, or has numbers that JSON does not know.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        values = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise Refusal(f"the body: expected a JSON object, received {_shown(values)}")
    return values


@dataclass
class Fields:
    """A body's fields, each taken once; what is left over is refused.

    Attributes:
        values: Names and values, without those that are null.
    """

    values: dict[str, Any]
    _taken: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        self.values = {name: value for name, value in self.values.items() if value is not None}

    def take(self, name: str, kinds: Any, what: str, default: Any = None) -> Any:
        """A field's value.

        Args:
            name: The field.
            kinds: Types of it; a bool is no number.
            what: The expectation, in words.
            default: Its value where it is not given.
        """
        self._taken.add(name)
        value = self.values.get(name, default)
        if name in self.values and (
            not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)
        ):
            raise Refusal(f"{name}: expected {what}, received {_shown(value)}", name)
        return value

    def number(self, name: str, default: float | None = None) -> Any:
        """A number that is none too large to be one."""
        value = self.take(name, (int, float), "a number", default)
        try:
            return None if value is None else float(value)
        except OverflowError:
            raise Refusal(f"{name}: expected a number, received {_shown(value)}", name) from None

    def integer(self, name: str, least: int, most: int, default: int | None = None) -> Any:
        """A whole number within bounds."""
        what = f"an integer in {least}..{most}"
        value = self.take(name, int, what, default)
        if value is not None and not least <= value <= most:
            raise Refusal(f"{name}: expected {what}, received {_shown(value)}", name)
        return value

    def asks_for_nothing(self, **neutral: Any) -> None:
        """Refuses fields that are not done here, unless they have a value that asks for nothing."""
        for name, value in neutral.items():
            self._taken.add(name)
            given = self.values.get(name, value)
            if type(given) is bool or given != value:
                raise Refusal(f"{name} is not supported", name, code="unsupported_parameter")

    def check_rest(self) -> None:
        """Refuses fields that nobody took.

        Raises:
            Refusal: There is one.
        """
        for name in self.values.keys() - self._taken:
            raise Refusal(f"unknown field {_shown(name)}", name, code="unknown_parameter")


def completion_job(fields: Fields, worker: Worker) -> Job:
    """The job of a body of /v1/completions."""
    fields.asks_for_nothing(suffix="", presence_penalty=0, frequency_penalty=0)
    prompts = _prompts(fields, worker)
    n = fields.integer("n", 1, MOST_CHOICES, 1)
    if fields.integer("best_of", 1, MOST_CHOICES, n) != n:
        raise Refusal("best_of: only the value of n is supported", "best_of")
    fields.take("user", str, "a string")
    logprobs = fields.integer("logprobs", 0, ALTERNATIVES)
    is_echoed = fields.take("echo", bool, "true or false", False)
    new = fields.integer("max_tokens", 0, worker.window, 16)
    if new == 0 and not is_echoed:
        raise Refusal("max_tokens: 0 needs echo", "max_tokens")
    return make_job(
        fields, worker, prompts, n, max(new, 1), logprobs, is_echoed=is_echoed, is_empty=new == 0
    )


def make_job(
    fields: Fields, worker: Worker, prompts: list[list[int]], choices: int, new_tokens: int,
    logprobs: int | None, is_echoed: bool = False, is_empty: bool = False,
) -> Job:  # fmt: skip
    """The job of some prompts, with the settings that every kind of request may have.

    Args:
        fields: The rest of the body.
        worker: The model.
        prompts: Ids of each prompt.
        choices: Texts of each.
        new_tokens: Most tokens to write.
        logprobs: How many alternatives of each token are named; None: no probabilities.
        is_echoed: Whether the prompt is part of the text.
        is_empty: Whether nothing is to be written.

    Raises:
        Refusal: A field that cannot be honoured, or one that nobody knows.
    """
    stops = _stops(fields)
    settings = _settings(fields, worker, new_tokens, stops)
    seed = fields.integer("seed", -_SEEDS, _SEEDS - 1)
    is_streamed = fields.take("stream", bool, "true or false", False)
    has_usage = _stream_options(fields)
    fields.check_rest()
    seed = secrets.randbits(62) if seed is None else seed % _SEEDS
    worker.check_room(len(prompts) * choices)
    rows: list[Row] = []
    for prompt in prompts:
        for choice in range(choices):
            try:
                request = make_request(
                    worker.model, [prompt], [[1] * len(prompt)], settings,
                    (seed + choice) % _SEEDS, worker.tokenizer,
                )  # fmt: skip
                has_scores = logprobs is not None
                rows.append(Row(request, has_scores, has_scores and is_echoed))
            except OPTError as error:
                raise _refusal(error, prompt, new_tokens, worker) from None
    return Job(rows, choices, stops, logprobs, is_streamed, has_usage, is_echoed, is_empty)


def _refusal(error: OPTError, prompt: list[int], new_tokens: int, worker: Worker) -> Refusal:
    """A setting's own message; names of settings are those of fields, with few exceptions."""
    if len(prompt) + new_tokens - 1 > worker.window:
        return Refusal(
            f"the model's window has {worker.window} tokens: {len(prompt)} of the prompt and "
            f"{new_tokens} new ones do not fit; shorten the prompt or lower max_tokens",
            "prompt", code="context_length_exceeded",
        )  # fmt: skip
    name = str(error).partition(":")[0]
    return Refusal(str(error), name if name in _SAMPLING else None)


def _settings(
    fields: Fields, worker: Worker, new_tokens: int, stops: tuple[str, ...]
) -> GenerationConfig:
    temperature = fields.number("temperature", 1)
    given = {
        "do_sample": temperature != 0,
        "temperature": temperature or 1.0,
        "top_p": fields.number("top_p", 1),
        "top_k": fields.integer("top_k", -1, worker.model.config.vocab_size, 0),
        "min_p": fields.number("min_p"),
        "repetition_penalty": fields.number("repetition_penalty", 1),
        "min_new_tokens": fields.integer("min_tokens", 0, new_tokens),
        "sequence_bias": _biases(fields, worker),
        "max_new_tokens": new_tokens,
        "stop_strings": stops or None,
    }
    given["top_k"] = max(given["top_k"], 0)  # -1 is vLLM's way to say all
    defaults = worker.model.generation_config
    ids = {name: getattr(defaults, name) for name in ("eos_token_id", "pad_token_id")}
    try:
        return GenerationConfig(**ids, **given)
    except OPTError as error:
        raise _refusal(error, [], 0, worker) from None


def _prompts(fields: Fields, worker: Worker) -> list[list[int]]:
    """Ids of each prompt of a text, a list of texts, ids, or a list of ids."""
    what = "a text, a list of texts, a list of token ids or a list of such lists"
    given: Any = fields.take("prompt", (str, list), what)
    if given is None:
        raise Refusal("prompt: expected " + what + ", received none", "prompt")
    each = [given] if isinstance(given, str) or _is_ids(given) else given
    if not each or not all(isinstance(one, str) or (one and _is_ids(one)) for one in each):
        raise Refusal(f"prompt: expected {what}, received {_shown(given)}", "prompt")
    size = worker.model.config.vocab_size
    for i in (i for one in each if not isinstance(one, str) for i in one):
        if not 0 <= i < size:
            raise Refusal(f"prompt: {_shown(i)} is no token id (vocab_size={size})", "prompt")
    return [encode(worker, one, "prompt") if isinstance(one, str) else one for one in each]


def encode(worker: Worker, text: str, param: str, add_special_tokens: bool = True) -> list[int]:
    """The ids of a text.

    Raises:
        Refusal: It is no text, such as half a pair of surrogates.
    """
    try:
        return worker.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except (OPTError, UnicodeError) as error:
        raise Refusal(f"{param}: {error}", param) from None


def _stops(fields: Fields) -> tuple[str, ...]:
    given: Any = fields.take("stop", (str, list), f"a text or up to {MOST_STOPS} of them", [])
    stops = [given] if isinstance(given, str) else given
    is_right = all(isinstance(stop, str) and stop for stop in stops)
    if len(stops) > MOST_STOPS or not is_right:
        raise Refusal(
            f"stop: expected a text or up to {MOST_STOPS} of them, none empty, "
            f"received {_shown(given)}", "stop",
        )  # fmt: skip
    return tuple(stops)


def _stream_options(fields: Fields) -> bool:
    given: Any = fields.take("stream_options", dict, "an object", {})
    inner = Fields(given)
    has_usage = inner.take("include_usage", bool, "true or false", False)
    inner.check_rest()
    return has_usage


def _biases(fields: Fields, worker: Worker) -> Any:
    """`logit_bias`, ids as JSON has them: in texts."""
    given: Any = fields.take("logit_bias", dict, "an object of token ids and numbers", {})
    what = f"up to {MOST_BIASED} token ids with numbers from -100 to 100"
    found: dict[tuple[int, ...], float] = {}
    for name, value in given.items():
        is_id = name.isdecimal() and int(name) < worker.model.config.vocab_size
        is_number = type(value) in (int, float) and -100 <= value <= 100
        if not is_id or not is_number or len(given) > MOST_BIASED:
            raise Refusal(f"logit_bias: expected {what}, received {_shown(given)}", "logit_bias")
        found[int(name),] = float(value)
    return found or None


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def _shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    text = json.dumps(value) if not isinstance(value, Mapping) else "an object"
    return text if len(text) <= 40 else text[:40] + "..."
