"""Reads metaseq's pickles, full of OmegaConf and training classes, without importing any of them.

Where `opt_core.checkpoints.torch_pickle` refuses what is no tensor, this keeps it as an inert
description: the name of a class, what it was called with, the state it was given. Nothing is looked
up or called.
"""

from dataclasses import dataclass, field
from typing import Any, cast

from opt_core.checkpoints.torch_pickle import Global, PickleMachine

_MAX_VISITED = 100_000
_BYTES = {
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("BINSTRING", "SHORT_BINSTRING", "STRING", "BINUNICODE8", "UNICODE"),
}
_NUMBERS = {"INT", "LONG", "LONG4", "FLOAT"}


@dataclass(eq=False, repr=False)
class Inert:
    """A stand-in for an object that is not made.

    Attributes:
        kind: Name of its class or function.
        arguments: What it would have been called with.
        state: What it would have been filled with.
        items: Its items, if it is a kind of dict.
    """

    kind: str
    arguments: object = None
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict[Any, Any])


class InertMachine(PickleMachine):
    """Walks any pickle's opcodes and builds `Inert` for what is neither plain nor a tensor."""

    def _step(self, opcode: str, argument: Any) -> None:
        if isinstance(argument, int) and abs(argument) >= 2**63:  # of a random generator's state
            self.stack.append(Inert("int"))
        else:
            super()._step(opcode, argument)

    def _global(self, module: object, name: object) -> Global:
        return Global(f"{module}.{name}")

    def _call(self, function: object, arguments: object) -> object:
        name = function.name if isinstance(function, Global) else ""
        if name.startswith("torch._utils._rebuild_tensor") or name.endswith("_rebuild_parameter"):
            return super()._call(function, arguments)
        if name == "collections.OrderedDict" and arguments == ():
            return {}
        values = cast(tuple[object, ...], arguments) if isinstance(arguments, tuple) else ()
        if name == "torch.Size" and len(values) == 1:
            return values[0]
        return Inert(name or "?", values)

    def _append(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            super()._append(items)

    def _set(self, items: list[Any]) -> None:
        top = self.stack[-1]
        target: dict[Any, Any] = top.items if isinstance(top, Inert) else self._container(dict)
        pairs = iter(items)
        for key, value in zip(pairs, pairs, strict=True):
            if isinstance(key, str | int):  # no other key can name a tensor or a setting
                target[key] = value

    def _build(self, state: object) -> None:
        if isinstance(self.stack[-1], Inert):
            self.stack[-1].state = state

    def _other(self, opcode: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        if opcode in _BYTES or opcode in _NUMBERS:
            push(argument)
        elif opcode in ("NEWOBJ", "NEWOBJ_EX"):
            if opcode == "NEWOBJ_EX":
                pop()
            arguments, kind = pop(), pop()
            push(Inert(kind.name if isinstance(kind, Global) else "?", arguments))
        elif opcode in ("EMPTY_SET", "FROZENSET"):
            if opcode == "FROZENSET":
                self._pop_to_mark()
            push(Inert("set"))
        elif opcode == "ADDITEMS":
            self._pop_to_mark()
        elif opcode == "OBJ":
            kind, *_ = self._pop_to_mark()
            push(Inert(kind.name if isinstance(kind, Global) else "?"))
        elif opcode == "POP":
            pop()
        elif opcode == "POP_MARK":
            self._pop_to_mark()
        elif opcode == "DUP":
            push(self.stack[-1])
        else:
            super()._other(opcode, argument)


def find_settings(root: object, names: frozenset[str]) -> dict[str, Any]:
    """Looks for settings by name, however deep in an object they are; the first of each counts.

    Args:
        root: What a pickle holds under "cfg" or "args".
        names: Names to look for; values are strings, numbers and booleans.
    """
    found: dict[str, Any] = {}
    waiting: list[Any] = [root]
    seen: set[int] = set()
    while waiting and len(seen) < _MAX_VISITED:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Inert):
            waiting += [item.arguments, item.items, item.state]
        elif isinstance(item, dict):
            entries = cast(dict[Any, Any], item)
            for name in names & entries.keys():
                value = _value(entries[name])
                if isinstance(value, str | int | float) and name not in found:
                    found[name] = value
            waiting += entries.values()
        elif isinstance(item, list | tuple):
            waiting += cast(list[Any], item)
    return found


def _value(item: Any) -> Any:
    # OmegaConf keeps each value in a node of its own.
    state = item.state if isinstance(item, Inert) else None
    return cast(dict[str, Any], state).get("_val") if isinstance(state, dict) else item
