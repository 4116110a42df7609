"""Tokenizer folders to test with: a small trained one laid out like OPT's, and the real one."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = [
    "Hello world, my dog is a little older than yours.",
    "The quick brown fox jumps over the lazy dog; the dog sleeps.",
    "I like you. I like your dog, and the world likes it too!",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
OPT_CONFIG = {
    "tokenizer_class": "GPT2Tokenizer",
    "add_bos_token": True,
    "add_prefix_space": False,
    "errors": "replace",
    **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>"),
    "pad_token": "<pad>",
}


def trained(alphabet: bool = True) -> Tokenizer:
    """A byte-level BPE with OPT's first four ids and about 60 merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 256 + 60,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet else [],
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    return backend


def write_opt_folder(folder: Path, config: dict[str, Any] | None = None, **kwargs: Any) -> Path:
    """Writes vocab.json, merges.txt and tokenizer_config.json, as OPT's repositories have them."""
    folder.mkdir(parents=True, exist_ok=True)
    model = json.loads(trained(**kwargs).to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    write_config(folder, OPT_CONFIG if config is None else config)
    return folder


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_real_folder(folder: Path) -> Path:
    """The real vocabulary with OPT's tokenizer_config.json; skips the test where it is absent."""
    default = Path(__file__).parents[3] / "shared" / "data"
    data = Path(os.environ.get("OPT_DATA", default))
    if not (data / "vocab.json").is_file():
        pytest.skip(f"no vocab.json in {data}: set OPT_DATA to a folder with OPT's vocabulary")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(data / name, folder / name)
    write_config(folder, OPT_CONFIG)
    return folder
