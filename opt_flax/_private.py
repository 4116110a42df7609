"""Everything undocumented of JAX that this backend uses: the rest of it imports it from here."""

from typing import Any, cast

import jax
from flax import nnx
from flax.nnx import graphlib

from opt_core.config import OPTConfig
from opt_core.errors import ConfigError


def register_config() -> None:
    """Makes a configuration a node of NNX's graphs: no arrays, and its settings as they are now.

    A configuration can be set. As a static attribute it would be compared with itself, so that what
    was set would not reach programs made before; as a node it enters a graph's definition as a
    snapshot, and models that share it still do after `nnx.jit`.
    """
    nnx.register_data_type(OPTConfig)
    graphlib.register_graph_node_type(
        OPTConfig,
        lambda config: ([("settings", graphlib.StaticElem(config.snapshot()))], None),
        lambda config, _, settings: config.become(cast(Any, settings)),
        lambda config, _: cast(Any, config.snapshot()),
        lambda _: OPTConfig(),
        lambda config: None,
        lambda config, values: config.become(cast(Any, dict(values)["settings"])),
    )
    jax.tree_util.register_pytree_node(
        OPTConfig,
        lambda config: ((), config.snapshot()),
        lambda settings, _: settings.config.copy(),
    )


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


def coordinator() -> Any:
    """The place where all processes of `jax.distributed` find texts by name, seen in JAX 0.10."""
    from jax._src import distributed

    return distributed.global_state.client
