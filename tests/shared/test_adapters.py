"""Adapters of live PEFT in every backend, and ours in live PEFT: the same logits.

The rules of each setting are neutral and tested in tests/torch/test_adapters.py.
"""

import importlib
from typing import Any

import numpy as np
import pytest

from conversion import convert
from opt_core.errors import CheckpointError, ConfigError
from tests.support.backends import ORACLE_TOLERANCE
from tests.support.configs import CONFIGS
from tests.support.files.peft_adapters import make_adapter, ours_logits, theirs, theirs_logits
from tests.support.reference import make_prompts

pytestmark = pytest.mark.dealt

CONFIG = CONFIGS["post_ln"]
IDS = make_prompts(CONFIG, 2, 7)
KINDS = {
    "beside the weights": {"target_modules": "all-linear", "use_rslora": True, "half": True},
    "in the weights": {"use_dora": True, "bias": "all", "modules_to_save": ["embed_tokens"]},
    "more words": {
        "vocabulary": 104, "trainable_token_indices": [3, 103], "init_lora_weights": "olora"
    },
    "another head": {"head": "sequence_classification", "labels": 3, "vocabulary": 104},
}  # fmt: skip


@pytest.fixture
def lora(backend):
    return importlib.import_module(f"opt_{backend.name}.lora")


@pytest.mark.filterwarnings("ignore:.*freshly initialised and needs training")
@pytest.mark.parametrize("kind", KINDS)
def test_as_peft(backend, lora, kind, folder, tmp_path):
    """Merged when the adapter's folder is loaded, and on a model that is loaded already."""
    base = folder(CONFIG)
    settings: dict[str, Any] = {"head": "causal_lm"} | KINDS[kind]
    expected = make_adapter(base, tmp_path / "adapter", IDS, **settings)
    merged = backend.load(tmp_path / "adapter", settings["head"])
    assert merged.config.vocab_size == settings.get("vocabulary", 99)
    close(ours_logits(backend, merged, IDS), expected)
    config = CONFIG.replace(num_labels=settings.get("labels", 2))
    live = backend.load(base, settings["head"], config=config)
    lora.load_adapter(live, tmp_path / "adapter")
    assert live.config == merged.config.replace(dtype=live.config.dtype)
    close(ours_logits(backend, live, IDS), expected)
    lora.merge(live)
    lora.unload(live)
    assert not lora.adapters(live)
    close(ours_logits(backend, live, IDS), expected)
    if settings["head"] == "causal_lm":
        live.save_pretrained(tmp_path / "saved")
        close(ours_logits(backend, backend.load(tmp_path / "saved"), IDS), expected)


def test_ours_in_peft(backend, lora, folder, tmp_path):
    """A model that has read an adapter of PEFT writes one that PEFT reads: the same logits."""
    peft = pytest.importorskip("peft")
    base, first, again = folder(CONFIG), tmp_path / "first", tmp_path / "again"
    expected = make_adapter(base, first, IDS, use_rslora=True)
    model = backend.load(base)
    lora.load_adapter(model, first)
    lora.save_adapter(model, again, str(base))
    read = peft.PeftModel.from_pretrained(theirs(base, "causal_lm"), again).eval()
    close(theirs_logits(read, IDS), expected)
    close(ours_logits(backend, backend.load(again), IDS), expected)


def test_what_cannot_be(backend, lora, folder, tmp_path):
    base, adapter = folder(CONFIG), tmp_path / "adapter"
    make_adapter(base, adapter, IDS, target_modules=["fc1", "lm_head"])
    quantized = backend.load(base, quantize="int8")
    with pytest.raises(CheckpointError, match=r"a quantised .* load the model with adapter="):
        lora.load_adapter(quantized, adapter)
    model = backend.load(base)
    lora.load_adapter(model, adapter)
    with pytest.raises(ConfigError, match="the model has adapters already; merge and unload them"):
        lora.load_adapter(model, adapter)
    with pytest.raises(ConfigError, match=r"adapters read from .* are not written again"):
        lora.save_adapter(model, tmp_path / "again")


def test_quantised(backend, folder, tmp_path):
    """The adapter is merged first, and what comes out is quantised."""
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    make_adapter(folder(CONFIG), adapter, IDS, target_modules=["fc1", "lm_head"])
    convert(adapter, merged)
    models = (backend.load(path, quantize="int8") for path in (adapter, merged))
    one, other = (ours_logits(backend, model, IDS) for model in models)
    np.testing.assert_array_equal(one, other)


def close(ours, theirs, atol=ORACLE_TOLERANCE):
    np.testing.assert_allclose(ours, theirs, atol=atol)
