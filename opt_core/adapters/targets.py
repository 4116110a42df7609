"""Which parameters of a model an adapter's configuration means, by PEFT's rules.

PEFT compares names of modules, as they are in the model that the adapter was trained on: those of a
bare decoder do not begin with "model.".
"""

import re
from collections.abc import Iterable

from opt_core.adapters.settings import AdapterSettings
from opt_core.params import ParamSpec

DEFAULT_TARGETS = ("q_proj", "v_proj")
"""PEFT's choice for OPT."""

LM_HEAD = "lm_head.weight"
_ALL_LINEAR = "all-linear"


def adapted_names(
    settings: AdapterSettings, specs: Iterable[ParamSpec], prefix: str
) -> dict[str, str]:
    """The weights that have adapters, and the name that rank and scale of each go by.

    Args:
        settings: The adapter's configuration.
        specs: The model's parameters.
        prefix: What canonical names begin with that the names of modules lack, such as "model.".
    """
    found: dict[str, str] = {}
    for spec in specs:
        if len(spec.shape) != 2:
            continue
        name = spec.name.removeprefix(prefix)
        module = name.removesuffix(".weight")
        if _is_target(settings, module, spec):
            found[spec.name] = module
        elif _ends_with(name, settings.target_parameters):
            found[spec.name] = name
    return found


def saved_names(settings: AdapterSettings, specs: Iterable[ParamSpec], prefix: str) -> set[str]:
    """The parameters of the modules that were trained as a whole."""
    return {s.name for s in specs if _is_saved(settings, s.name.removeprefix(prefix))}


def token_rows(settings: AdapterSettings, name: str, prefix: str) -> tuple[int, ...]:
    """The rows of a weight that were trained; none if it is not one of those."""
    module = name.removeprefix(prefix).removesuffix(".weight")
    for layer, rows in settings.token_indices.items():
        if _ends_with(module, [layer or "embed_tokens"]):
            return rows
    return ()


def _is_target(settings: AdapterSettings, module: str, spec: ParamSpec) -> bool:
    rule, excluded = settings.target_modules, settings.exclude_modules
    if isinstance(excluded, str) and excluded:
        if re.fullmatch(excluded, module):
            return False
    elif _ends_with(module, excluded):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in settings.modules_to_save):
        return False
    if isinstance(rule, str):
        if rule.lower() == _ALL_LINEAR:
            return spec.kind == "linear" and spec.name != LM_HEAD and "labels" not in spec.axes
        return re.fullmatch(rule, module) is not None
    names = DEFAULT_TARGETS if rule is None else rule
    if module in names:
        return True
    return _ends_with(module, names) and _is_in_layers(settings, module)


def _is_in_layers(settings: AdapterSettings, module: str) -> bool:
    if settings.layers_to_transform is None:
        return True
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in settings.layers_pattern]
    found = (re.match(pattern, module) for pattern in patterns or [r".*?\.[^.]*\.(\d+)\."])
    match = next(filter(None, found), None)
    return match is not None and int(match[1]) in settings.layers_to_transform


def _is_saved(settings: AdapterSettings, name: str) -> bool:
    """Whether a module that a parameter is part of was trained as a whole."""
    parts = name.split(".")[:-1]
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(m.endswith(saved) for m in modules for saved in settings.modules_to_save)


def _ends_with(name: str, endings: Iterable[str]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
