"""Texts that objects print: one screen of names, shapes and types, no numbers of tensors."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, cast

from opt_core.params import ParamSpec


def describe_value(value: Any) -> str:
    """A value in a few words: "float32 [1, 3, 1024]" of a tensor, "5 x (...)" of equal ones."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        name = str(getattr(dtype, "name", dtype)).removeprefix("torch.")
        sizes = ", ".join(map(str, shape))
        return f"{name} [{sizes}]" if sizes else f"{name} {_number(value)}"
    if isinstance(value, tuple | list):
        values = cast("Sequence[Any]", value)
        runs = [(text, len(list(run))) for text, run in groupby(map(describe_value, values))]
        return ", ".join(text if count == 1 else f"{count} x ({text})" for text, count in runs)
    return repr(value)


def describe_fields(name: str, fields: Mapping[str, Any]) -> str:
    """A name with a line for each field, in parentheses."""
    shown = {field: describe_value(value) for field, value in fields.items()}
    lines = [textwrap.indent(f"{field}: {text},\n", "  ") for field, text in shown.items()]
    return f"{name}(\n{''.join(lines)})" if lines else f"{name}()"


def describe_modules(name: str, specs: Sequence[ParamSpec], ending: str = "") -> str:
    """A model as the tree of its modules, layers that are alike on one branch.

    Args:
        name: The model's class.
        specs: Its parameters.
        ending: What to put on the last line, such as the parameters' number and type.
    """
    tree: dict[str, Any] = {}
    for spec in specs:
        *path, leaf = spec.name.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = spec
    lines = [f"{name}(", *_lines(tree, "  "), ")" + (f"  # {ending}" if ending else "")]
    return "\n".join(lines)


def _lines(branch: Mapping[str, Any], indent: str) -> list[str]:
    """The modules below one, as lines."""
    found: list[str] = []
    shown = [(part, _below(value, indent)) for part, value in branch.items()]
    for below, run in groupby(shown, key=lambda item: item[1]):
        names = [part for part, _ in run]
        if names[0].isdigit() and len(names) > 1:
            head = f"({names[0]}-{names[-1]}): {len(names)} x"
            found += [f"{indent}{head} {below[0]}", *below[1:]]
        else:
            for part in names:
                found += [f"{indent}({part}): {below[0]}", *below[1:]]
    return found


def _below(branch: Mapping[str, Any], indent: str) -> list[str]:
    """The text behind a name of a module, and the lines below it."""
    specs = [value for value in branch.values() if isinstance(value, ParamSpec)]
    if not specs:
        return ["(", *_lines(branch, indent + "  "), indent + ")"]
    weight = specs[0]
    bias = ", bias" if len(specs) > 1 and weight.kind == "linear" else ""
    sizes = weight.shape[::-1] if weight.kind == "linear" else weight.shape
    arrow = " -> " if weight.kind == "linear" else ", "
    return [f"{weight.kind} {arrow.join(map(str, sizes))}{bias}"]


def _number(value: Any) -> str:
    """A scalar's value where there is one, nothing inside a program being compiled."""
    try:
        return f"{float(value):.6g}"
    except (TypeError, ValueError, RuntimeError):  # traced, symbolic, fake, on no device
        return "scalar"
