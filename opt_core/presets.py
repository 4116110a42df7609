"""The official sizes, one line each.

Sources: the hub's config.json of facebook/opt-* and facebook/galactica-*; opt-175b from the OPT
paper (arXiv 2205.01068, table 1). Parameter counts are asserted in tests/core/test_params.py.
"""

from typing import Any


def _opt(layers: int, width: int, heads: int, **extra: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "ffn_dim": 4 * width,
        **extra,
    }


def _galactica(layers: int, width: int, heads: int, **extra: Any) -> dict[str, Any]:
    return _opt(layers, width, heads, **extra) | {
        "vocab_size": 50000,
        "activation_function": "gelu",
        "attention_dropout": 0.1,
        "bos_token_id": 0,
    }


_POST_LN = {"do_layer_norm_before": False, "word_embed_proj_dim": 512}
_BARE = {"enable_bias": False, "layer_norm_elementwise_affine": False}

PRESETS: dict[str, dict[str, Any]] = {
    "opt-125m": _opt(12, 768, 12),
    "opt-350m": _opt(24, 1024, 16, **_POST_LN),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-2.7b": _opt(32, 2560, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "opt-175b": _opt(96, 12288, 96),
    "galactica-125m": _galactica(12, 768, 12),
    "galactica-1.3b": _galactica(24, 2048, 32),
    "galactica-6.7b": _galactica(32, 4096, 32),
    "galactica-30b": _galactica(48, 7168, 56, **_BARE),
    "galactica-120b": _galactica(96, 10240, 80, **_BARE),
}
