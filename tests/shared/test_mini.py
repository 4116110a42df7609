"""The embedded model: small, complete, and it writes Shakespeare rather than noise."""

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

import opt_core
from opt_core import OPTConfig, OPTTokenizer
from opt_core.params import count_parameters
from tests.support.backends import BACKENDS
from tests.support.tiers import tiered

pytestmark = pytest.mark.dealt

MINI = Path(opt_core.__file__).parent / "mini"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "mini.json"
TEXT = (
    Path(os.environ.get("OPT_DATA", Path(__file__).parents[3] / "shared" / "data"))
    / "tinyshakespeare.txt"
)


def test_it_is_small_and_complete():
    files = {p.name for p in MINI.iterdir()}
    assert files >= {
        "README.md", "config.json", "generation_config.json", "merges.txt", "model.safetensors",
        "tokenizer_config.json", "vocab.json",
    }  # fmt: skip
    assert (MINI / "model.safetensors").stat().st_size <= 8 * 2**20
    config = OPTConfig.from_pretrained("mini")
    assert 2_000_000 <= count_parameters(config) <= 6_000_000
    assert config.dtype == "float16"
    tokenizer = OPTTokenizer.from_pretrained("mini")
    assert tokenizer.vocab_size == config.vocab_size == 1024
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2, 2)


def test_its_card_states_what_was_measured():
    measured = json.loads(RESULTS.read_text())
    best = min(point["held_out_bits_per_byte"] for point in measured["curve"])
    assert f"{best:.2f} bits per byte" in (MINI / "README.md").read_text(encoding="utf-8")


def test_it_writes_in_english_words(backend):
    """Of the words of a sample, nearly all must be words a reader of Shakespeare knows."""
    tokenizer = OPTTokenizer.from_pretrained("mini")
    model = backend.load("mini")
    prompts = tokenizer(
        ["ROMEO:", "KING RICHARD III:", "First Citizen:\nBefore"], padding_side="left"
    )
    out = backend.generate(
        model, prompts.input_ids, attention_mask=prompts.attention_mask, max_new_tokens=120, seed=0
    )
    text = " ".join(tokenizer.batch_decode(out, skip_special_tokens=True))
    words = re.findall(r"[a-z]+", text.lower())
    common = {
        "the", "and", "to", "i", "of", "you", "my", "a", "that", "in", "is", "not", "me", "it",
        "for", "with", "be", "his", "your", "this", "but", "he", "have", "as", "thou", "him", "so",
        "will", "what", "thy", "all", "her", "no", "by", "do", "shall", "if", "are", "we", "thee",
        "on", "lord", "our", "king", "good", "now", "sir", "from", "come", "or", "at", "let",
        "they", "was", "she", "here", "would", "more", "there", "love", "their", "am", "how", "man",
        "then", "well", "like", "know", "us", "o", "them", "say", "than", "hath", "one", "may",
        "upon", "make", "go", "did", "yet", "must", "see", "were", "such", "where", "give", "why",
        "who", "can", "out", "had", "should", "tis", "an",
    }  # fmt: skip
    assert len(words) > 100
    assert sum(word in common for word in words) / len(words) > 0.35, text
    assert len(set(words)) > 60, text


# That logits and the mean loss are alike in all backends is shown on small models.
@pytest.mark.parametrize("backend", tiered(BACKENDS, lambda name: name == "torch"), indirect=True)
@pytest.mark.xla  # TensorFlow's graphs take fifty times as long for these batches
@pytest.mark.skipif(
    not TEXT.exists(), reason="needs tinyshakespeare.txt, in the folder named by OPT_DATA"
)
def test_held_out_bits_per_byte_are_the_published_ones(backend):
    text = TEXT.read_text(encoding="utf-8")
    held_out = text[len(text) * 9 // 10 :]
    tokenizer = OPTTokenizer.from_pretrained("mini")
    ids = np.array(tokenizer.encode(held_out, add_special_tokens=False))
    ids = ids[: len(ids) // 255 * 255]
    rows = np.pad(ids.reshape(-1, 255), ((0, 0), (1, 0)), constant_values=2)
    nats = backend.evaluate(
        backend.load("mini", dtype="float32"), [rows[i : i + 32] for i in range(0, len(rows), 32)]
    )
    bits = nats * len(ids) / len(tokenizer.decode(ids).encode()) / math.log(2)
    measured = json.loads(RESULTS.read_text())
    best = min(point["held_out_bits_per_byte"] for point in measured["curve"])
    assert abs(bits - best) < 0.005
