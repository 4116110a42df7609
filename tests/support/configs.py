"""Tiny models with the structure of the real ones; every test that needs a model starts from these.

The vocabulary is no multiple of 8, no two widths are equal by chance, and all three have dropout as
the hub's configurations do, so that a test which forgets to switch it off is noticed.
"""

from typing import Any

from opt_core.config import OPTConfig

_TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "ffn_dim": 56,
    "max_position_embeddings": 512,
    "dropout": 0.1,
}

CONFIGS = {
    "pre_ln": OPTConfig(**_TINY),
    "post_ln": OPTConfig(**_TINY, do_layer_norm_before=False, word_embed_proj_dim=24),
    "galactica": OPTConfig(
        **_TINY,
        activation_function="gelu",
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        attention_dropout=0.1,
        bos_token_id=0,
    ),
}
"""Like opt-125m; like opt-350m (post-LN, projection, no final norm); like galactica-30b."""
