"""Classes of a user's own, as `from_pretrained` makes them."""

import inspect
from typing import Any

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
