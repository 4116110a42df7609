"""Conversations as text by a Jinja template, with what `transformers` puts at a template's hand."""

import json
from datetime import datetime
from typing import Any

from opt_core.errors import TokenizerError


def render(template: str, **values: Any) -> str:
    """The text that a template makes of values.

    Raises:
        TokenizerError: There is no jinja2.
        jinja2.TemplateError: The template is damaged, or raises.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise TokenizerError("apply_chat_template needs jinja2: pip install jinja2") from None

    class Generation(Extension):
        """A block around what the model is to write, which is text like any other."""

        tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": _now}
    return environment.from_string(template).render(**values)


def _now(form: str) -> str:
    """The time, as a template lays it out."""
    return datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON as it is, where jinja2's own is made for HTML."""
    given: dict[str, Any] = {"ensure_ascii": False, **options}
    return json.dumps(value, indent=indent, **given)
