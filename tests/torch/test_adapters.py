"""All that PEFT can save for OPT is computed as PEFT does: merged when loaded, and in place."""

import numpy as np
import pytest

from opt_core.errors import ConfigError
from opt_torch import lora
from tests.support.backends import ORACLE_TOLERANCE, make_backend
from tests.support.configs import CONFIGS
from tests.support.files.peft_adapters import TASKS, make_adapter, ours_logits, theirs
from tests.support.reference import make_prompts
from tests.support.tiers import tiered

TORCH = make_backend("torch")
CONFIG = CONFIGS["post_ln"]
IDS = make_prompts(CONFIG, 2, 7)
PAIR = ["embed_tokens", "lm_head"]
UNTIED = {"tie_word_embeddings": False}

KINDS = {
    "bin in bfloat16": {"as_bin": True, "half": True},
    "rslora, patterns": {
        "use_rslora": True, "rank_pattern": {"fc2": 2},
        "alpha_pattern": {r"layers\.1\..*k_proj": 9, "fc2": 4},
    },
    "regex": {"target_modules": r"model\.decoder\.layers\.1\.(fc1|self_attn\.q_proj)"},
    "all-linear": {"target_modules": "all-linear", "fan_in_fan_out": True},
    "layers, exclude": {
        "layers_to_transform": [1], "layers_pattern": ["h", "layers"], "exclude_modules": ["fc2"],
    },
    "layer, exclude regex": {"layers_to_transform": 0, "exclude_modules": r".*\.fc\d"},
    "parameters": {
        "target_modules": [], "target_parameters": ["fc1.weight"], "alpha_pattern": {"fc1": 7},
    },
    "default targets": {"target_modules": None, "init_lora_weights": "gaussian"},
    "bias": {"bias": "all", "lora_bias": True},
    "dora, bias": {"use_dora": True, "bias": "lora_only", "target_modules": ["fc1", "project_in"]},
    "olora, rslora": {"init_lora_weights": "olora", "use_rslora": True},
    "olora, dora": {"init_lora_weights": "OLoRA", "use_dora": True},
    "tokens": {"trainable_token_indices": [3, 50]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [3, 50], "lm_head": [4, 50]}},
    "tokens untied": {"trainable_token_indices": [3, 50], "base": UNTIED},
    "modules": {"modules_to_save": ["layer_norm", "embed_positions"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "embedding, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "adapted pair": {"target_modules": PAIR},
    "adapted pair, tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "adapted pair, untied": {"target_modules": PAIR, "base": UNTIED, "use_dora": True},
    "resized": {"vocabulary": 104},
    "resized, head": {"vocabulary": 104, "modules_to_save": ["lm_head"]},
    "resized, tokens": {"vocabulary": 104, "trainable_token_indices": [99, 103]},
    "resized, adapted": {"vocabulary": 104, "target_modules": ["embed_tokens"]},
    "decoder": {"head": "none", "target_modules": r"decoder\.layers\.\d\.fc1"},
    "classifier": {"head": "sequence_classification", "labels": 3, "vocabulary": 104},
    "answers": {"head": "question_answering"},
}  # fmt: skip

FAST = (
    "bin in bfloat16", "rslora, patterns", "layers, exclude", "dora, bias", "olora, dora",
    "tokens of both", "adapted pair", "resized, head", "classifier",
)  # fmt: skip
"""Those that `make test` runs: one of each claim."""


@pytest.mark.filterwarnings("ignore:.*freshly initialised and needs training")
@pytest.mark.parametrize("kind", tiered(KINDS, FAST.__contains__))
def test_as_peft(kind, folder, tmp_path):
    settings = dict(KINDS[kind])
    base = folder(CONFIG.replace(**settings.pop("base", {})))
    head = settings.setdefault("head", "causal_lm")
    labels = settings.get("labels", 2)
    expected = make_adapter(base, tmp_path / "adapter", IDS, **settings)
    merged = TORCH.load(tmp_path / "adapter", head)
    assert merged.config.num_labels == labels
    assert merged.config.vocab_size == settings.get("vocabulary", 99)
    close(ours_logits(TORCH, merged, IDS), expected)
    given = TORCH.load(base, head, adapter=tmp_path / "adapter")
    np.testing.assert_array_equal(ours_logits(TORCH, given, IDS), ours_logits(TORCH, merged, IDS))
    options = {"config": CONFIG.replace(num_labels=labels)} if labels != 2 else {}
    live = TORCH.load(base, head, **options)
    lora.load_adapter(live, tmp_path / "adapter")
    close(ours_logits(TORCH, live, IDS), expected)
    lora.merge(live)
    lora.unload(live)
    assert not lora.adapters(live)
    close(ours_logits(TORCH, live, IDS), expected)
    if head == "causal_lm":  # what came out can be saved, and is the same model
        live.save_pretrained(tmp_path / "saved")
        close(ours_logits(TORCH, TORCH.load(tmp_path / "saved"), IDS), expected)


def test_pissa(folder, tmp_path):
    """Whose part of the weight only stands out where the singular values are apart."""
    from safetensors.numpy import load_file, save_file

    base = tmp_path / "base"
    TORCH.load(folder(CONFIG)).save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    for name in weights:
        if name.endswith(("k_proj.weight", "fc2.weight")):
            left, sizes, right = np.linalg.svd(weights[name], full_matrices=False)
            weights[name] = (left * sizes[0] * 0.7 ** np.arange(len(sizes))) @ right
    save_file({k: v.astype(np.float32) for k, v in weights.items()}, base / "model.safetensors")
    expected = make_adapter(base, tmp_path / "adapter", IDS, init_lora_weights="pissa")
    close(ours_logits(TORCH, TORCH.load(tmp_path / "adapter"), IDS), expected)
    live = TORCH.load(base)
    before = ours_logits(TORCH, live, IDS)
    lora.load_adapter(live, tmp_path / "adapter")
    close(ours_logits(TORCH, live, IDS), expected)
    lora.unload(live)
    np.testing.assert_array_equal(ours_logits(TORCH, live, IDS), before)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=ORACLE_TOLERANCE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", ["causal_lm", "sequence_classification"])
def test_live_peft_leaves_the_same_heads_out_of_all_linear(head, folder):
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "target_modules": "all-linear", "task_type": TASKS[head]}
    names = [
        set(peft.get_peft_model(model, peft.LoraConfig(**settings)).targeted_module_names)
        for model in (TORCH.load(folder(CONFIG), head), theirs(folder(CONFIG), head))
    ]
    assert names[0] == names[1]
    assert len(names[0]) == 14  # of two layers, and the two projections


def test_live_peft_is_told_that_quantised_weights_only_run(folder):
    peft = pytest.importorskip("peft")
    model = TORCH.load(folder(CONFIG), quantize="int8")
    with pytest.raises(ConfigError, match=r"^PEFT: .* can only be run; load it without quantize$"):
        peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
