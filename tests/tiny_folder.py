"""A complete model folder of some kilobytes, tokenizer included, for tests that need a path."""

import json
from pathlib import Path
from typing import Any

from tokenizers import ByteLevelBPETokenizer

import opt_torch
from tests.configs import CONFIGS

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
TEXT = "Now is the winter of our discontent made glorious summer by this sun of York"


def save_tokenizer(folder: Path) -> int:
    """Trains a byte-level BPE on one sentence, saves it like OPT's, returns its number of ids."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=290, min_frequency=1, special_tokens=[*SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(folder))
    named = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return bpe.get_vocab_size()


def save_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Saves a random model with the tokenizer above; fields of its config may be changed."""
    ids = save_tokenizer(folder)
    config = CONFIGS["pre_ln"].replace(**{"vocab_size": ids + 3, "init_std": 0.3, **changes})
    opt_torch.OPTForCausalLM(config, seed=seed).save_pretrained(folder)
    return folder
