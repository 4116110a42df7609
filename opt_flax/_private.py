"""Everything undocumented of JAX that this backend uses: the rest of it imports it from here."""

from typing import Any

import jax

from opt_core.errors import ConfigError


def load_splash_attention() -> tuple[Any, Any]:
    """Pallas' kernel for attention on a TPU and its masks, seen in JAX 0.10.

    It is loaded where it is first needed: `import opt_flax` loads 47 modules less.

    Raises:
        ConfigError: This JAX has none; every other implementation of attention works.
    """
    try:
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_kernel,
            splash_attention_mask,
        )
    except ImportError:
        raise ConfigError(
            'attn_implementation="flash_attention_2" on a TPU needs the splash attention of JAX '
            f'0.10, which JAX {jax.__version__} lacks; use "sdpa"'
        ) from None
    return splash_attention_kernel, splash_attention_mask
