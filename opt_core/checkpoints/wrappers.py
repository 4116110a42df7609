"""Trainers put things around a model: dicts around its tensors, modules around its names.

Nothing here makes a wrong model right: a plan still has to find every parameter, and no other.
"""

import re
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple, cast

STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "model_state", "net", "weights")
"""Where trainers keep the weights in a dict of many things; the first that is a dict is taken."""

_MAX_DEPTH = 8
# Modules of one child, around a model or any of its parts: DataParallel and DeepSpeed,
# torch.compile, FSDP, activation checkpointing, Lightning, and PEFT around a merged layer.
_AROUND = frozenset([
    "module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module",
    "_forward_module", "base_layer",
])  # fmt: skip
# What classes around a model call it: Lightning modules, PEFT, TRL, DeepSpeed-Chat's reward model.
_IN_FRONT = frozenset(["model", "base_model", "pretrained_model", "rwtransformer", "transformer"])
_VALUE_HEADS = frozenset(["v_head", "value_head"])  # TRL and DeepSpeed-Chat; OpenRLHF
_OWN = re.compile(
    r"(?:^|\.)(?:(?P<decoder>decoder\.)?"
    r"(?P<part>(?:embed_tokens|embed_positions|project_in|project_out|final_layer_norm)\.\w+$"
    r"|layers\.\d+\..+)"
    r"|(?P<head>(?:lm_head|score|qa_outputs)\.(?:weight|bias)$)|decoder\.version$)"
)


class Unwrapped(NamedTuple):
    """Names in a file without what is around them.

    Attributes:
        names: Name -> canonical name, or None for what is no weight of the model.
        wrappers: What was taken off names, such as "module", in order of appearance.
        aside: Names of value heads, which are no part of the model.
    """

    names: dict[str, str | None]
    wrappers: tuple[str, ...]
    aside: tuple[str, ...]


def unwrap_state(content: object) -> object:
    """The dict of tensors in what a trainer saved, however many dicts are around it."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(content, dict):
            break
        entries = cast(dict[object, object], content)
        inner = [entries[key] for key in STATE_KEYS if isinstance(entries.get(key), dict)]
        if not inner:
            return entries
        content = inner[0]
    return content


def unwrap_names(names: Collection[str]) -> Unwrapped:
    """Takes wrapping modules out of names, wherever they are.

    A class of unknown name around the model counts as one if it is around everything.

    Args:
        names: Names in a checkpoint; those that are no parameter's of OPT stay as they are.
    """
    found: dict[str, str | None] = {}
    fronts: dict[str, tuple[str, ...]] = {}
    aside: list[str] = []
    for name in names:
        parts = [part for part in name.split(".") if part not in _AROUND]
        bare = ".".join(parts)
        match = _OWN.search(bare)
        if not _VALUE_HEADS.isdisjoint(parts):
            aside.append(name)
        elif match:
            before = bare[: match.start()].split(".")
            front = tuple(part for part in before if part and part not in _IN_FRONT)
            if front and match["part"] and not match["decoder"]:
                continue  # layers, but maybe of an encoder
            fronts[name], found[name] = front, _canonical(match)
    # Of several classes around a model, or of one that has other parts, who knows what they do.
    is_around_all = len({*fronts.values()}) == 1 and len(fronts) + len(aside) == len(names)
    for name, front in fronts.items():
        if front and not is_around_all:
            found[name] = name
    removed: Counter[str] = Counter()
    for name, canonical in found.items():
        removed += Counter(name.split(".")) - Counter((canonical or name).split("."))
    known = found | dict.fromkeys(aside)
    return Unwrapped({name: known.get(name, name) for name in names}, tuple(removed), tuple(aside))


def is_beside_model(name: str) -> bool:
    """Whether a name is that of a part beside the model, and of none within it or around it."""
    parts = name.split(".")
    inner = {*_AROUND, *_IN_FRONT, "decoder", "lm_head", "score", "qa_outputs"}
    is_plain = re.fullmatch(r"[\w.]+", name, re.ASCII) is not None
    return is_plain and inner.isdisjoint(parts) and "lora_" not in name


def _canonical(match: re.Match[str]) -> str | None:
    return f"model.decoder.{match['part']}" if match["part"] else match["head"]


def prefix_of_decoder(names: Collection[str]) -> str | None:
    """The prefix of a decoder's names, such as "language_model."; None if there is none."""
    for name in names:
        match = _OWN.search(name)
        front = f".{name[: match.start()]}" if match and match["decoder"] else ""
        if front := front.removesuffix(".model").removeprefix("."):
            return f"{front}."
    return None
