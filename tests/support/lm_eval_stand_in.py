"""The part of `lm-eval` that the adapter needs, in a few lines: the package itself is too large."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class LM:
    """The base class: a hook that remembers results."""

    def __init__(self) -> None:
        self.remembered: list[tuple[str, Any, Any]] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *told: self.remembered.append(told))


def request(*args: Any) -> Any:
    """An instance, as tasks make them."""
    return SimpleNamespace(args=args)


def install(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    """Puts the stand-in where `import lm_eval` finds it, for one test."""
    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.tasks")}
    modules["lm_eval.api.model"] = ModuleType("lm_eval.api.model")
    vars(modules["lm_eval.api.model"])["LM"] = LM
    vars(modules["lm_eval"])["simple_evaluate"] = functions.get("simple_evaluate")
    vars(modules["lm_eval.tasks"])["TaskManager"] = functions.get("TaskManager")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "opt_core.evaluation.lm_eval", raising=False)
