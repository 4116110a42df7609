"""Classes of a user's own, as `from_pretrained` makes them."""

import inspect
from typing import Any

from opt_core.compatibility.notices import notice
from opt_core.config import OPTConfig
from opt_core.errors import ArgumentError


def make_model(cls: Any, config: OPTConfig, **options: Any) -> Any:
    """A model whose weights are to be replaced.

    A class whose constructor takes the configuration alone, as is usual with `transformers`, draws
    weights of its own first.

    Args:
        cls: The model's class.
        config: Its configuration.
        **options: Arguments of this library's constructors: `seed`, `attn_implementation`, ...

    Raises:
        ArgumentError: The constructor does not take an option that is needed.
    """
    parameters = inspect.signature(cls.__init__).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) or "seed" in parameters:
        return cls(config, **options)
    wanted = {k: v for k, v in options.items() if k not in ("seed", *parameters) and v}
    name = wanted.pop("attn_implementation", None)
    if wanted:
        raise ArgumentError(
            f"{cls.__name__}.__init__ takes no {next(iter(wanted))}=; write "
            "def __init__(self, config, **options) and super().__init__(config, **options)"
        )
    if name is not None:
        config = config.copy()
        config.attn_implementation = name
    return cls(config, **{k: v for k, v in options.items() if k in parameters})


_PARTS = ("model", "decoder", "lm_head", "score", "qa_outputs")
"""Attributes that hold OPT's own parameters."""


def warn_of_own_layers(model: Any, what: str) -> None:
    """Names layers that a class of the caller's adds: files hold OPT's parameters alone.

    Args:
        model: The model.
        what: What they are not: "written", "read".
    """
    own = [name for name in model._parameter_paths() if name.partition(".")[0] not in _PARTS]
    if own:
        names = ", ".join(own[:4]) + (f" and {len(own) - 4} more" if len(own) > 4 else "")
        notice(
            f"{type(model).__name__}: layers of its own are not {what}, only OPT's: {names}; keep "
            "them in a file of their own"
        )
