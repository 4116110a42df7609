"""/v1/chat/completions, for models that a chat template is given for: OPT has none of its own."""

from pathlib import Path
from typing import Any

from starlette.requests import Request

from opt_cli.serving.choices import Token
from opt_cli.serving.errors import Refusal
from opt_cli.serving.fields import MOST_CHOICES, Fields, Job, encode, make_job
from opt_cli.serving.worker import Worker
from opt_core.errors import ConfigError
from opt_core.serving.engine import ALTERNATIVES

MESSAGES = "a list of objects with role and content, texts both"


async def refuse(request: Request) -> Any:
    """The answer of a server without a template."""
    raise Refusal(
        "OPT has no chat template: start the server with --chat-template FILE, or use "
        "/v1/completions", None, 404, "no_chat_template",
    )  # fmt: skip


class Template:
    """A Jinja template of a conversation, with the names that those of `transformers` use.

    It is given `messages`, `add_generation_prompt`, `bos_token` and `eos_token`, and has
    `raise_exception`; it runs in Jinja's sandbox.

    Args:
        path: Its file.

    Raises:
        ConfigError: It is no template.
    """

    def __init__(self, path: Path) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = self._refuse
        try:
            self._template = environment.from_string(path.read_text("utf-8"))
        except (TemplateError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: no Jinja template: {error}") from None

    def render(self, messages: Any, worker: Worker) -> str:
        """The prompt of a conversation.

        Raises:
            Refusal: The template does not take it.
        """
        tokenizer: Any = worker.tokenizer
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, bos_token=tokenizer.bos_token,
                eos_token=tokenizer.eos_token,
            )  # fmt: skip
        except Refusal:
            raise
        except Exception as error:  # whatever a template does with what a client sent
            raise Refusal(f"messages: the chat template failed: {error}", "messages") from None

    @staticmethod
    def _refuse(message: str) -> None:
        raise Refusal(f"messages: {message}", "messages")


class Style:
    """How /v1/chat/completions writes its answers.

    Args:
        template: Makes a prompt of a conversation.
    """

    prefix, kind, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, template: Template) -> None:
        self.template = template

    def make_job(self, fields: Fields, worker: Worker) -> Job:
        """The job of a body."""
        fields.asks_for_nothing(presence_penalty=0, frequency_penalty=0, tools=[], functions=[],
                                response_format={"type": "text"})  # fmt: skip
        messages: Any = fields.take("messages", list, MESSAGES, [])
        if not messages or not all(_is_message(message) for message in messages):
            raise Refusal(f"messages: expected {MESSAGES}", "messages")
        fields.take("user", str, "a string")
        n = fields.integer("n", 1, MOST_CHOICES, 1)
        has_logprobs = fields.take("logprobs", bool, "true or false", False)
        alternatives = fields.integer("top_logprobs", 0, ALTERNATIVES, 0)
        # The template writes special tokens itself.
        prompt = encode(worker, self.template.render(messages, worker), "messages", False)
        if not prompt:
            raise Refusal("messages: the chat template makes nothing of them", "messages")
        room = max(1, worker.window - len(prompt) + 1)
        old = fields.integer("max_tokens", 1, worker.window, room)
        new = fields.integer("max_completion_tokens", 1, worker.window, old)
        logprobs = alternatives if has_logprobs else None
        return make_job(fields, worker, [prompt], n, new, logprobs)

    @staticmethod
    def choice(index: int, text: str, tokens: list[Token] | None, reason: str | None) -> Any:
        """One finished text."""
        message = {"role": "assistant", "content": text}
        return {
            "index": index, "message": message, "logprobs": _logprobs(tokens),
            "finish_reason": reason,
        }  # fmt: skip

    @staticmethod
    def delta(index: int, text: str, tokens: list[Token] | None, reason: str | None) -> Any:
        """A part of one, in a stream."""
        delta = {"role": "assistant", "content": text}
        return {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(tokens),
            "finish_reason": reason,
        }


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(name), str) for name in ("role", "content")
    )


def _logprobs(tokens: list[Token] | None) -> Any:
    if tokens is None:
        return None

    def entry(text: str, logprob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            {**entry(token.text, token.logprob), "top_logprobs": [entry(*b) for b in token.best]}
            for token in tokens
        ],
        "refusal": None,
    }
