"""Golden values published in transformers' tests, on the real checkpoints.

Set OPT_WEIGHTS to a folder that holds opt-125m, opt-350m, ... as downloaded from the hub.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from opt_core import OPTTokenizer

WEIGHTS = os.environ.get("OPT_WEIGHTS")
pytestmark = [
    pytest.mark.weights,
    pytest.mark.skipif(
        WEIGHTS is None, reason="needs real checkpoints, in the folder named by OPT_WEIGHTS"
    ),
]
GOLDEN_TOLERANCE = 5e-5
METASEQ_TOLERANCE = 1e-4

PROMPTS = [
    "Today is a beautiful day and I want to",
    "In the city of",
    "Paris is the capital of France and",
    "Computers and mobile phones have taken",
]
MEAN_LOGITS = [
    [1.3851, -13.8923, -10.5229, -10.7533, -0.2309, -10.2384, -0.5365, -9.0947, -5.1670],
    [-4.7073, -10.6276, -3.9415, -21.5242, -0.2822, -0.2822, -0.2822, -0.2822, -0.2822],
    [0.6247, -3.4229, -8.9179, -1.4297, -14.1650, 1.4146, -9.0218, -0.2703, -0.2703],
    [6.4783, -1.9913, -10.7926, -2.3336, 1.5092, -0.9974, -6.8213, 1.3477, 1.3477],
]
"""Mean over the vocabulary at each place; the repeated last values are places of padding."""


def checkpoint(name: str) -> Path:
    return Path(WEIGHTS or "") / name


def test_hidden_states_of_opt_350m(backend):
    ids = np.array([[0, 31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588, 2]])
    out = backend.run(backend.load(checkpoint("opt-350m"), "none"), input_ids=ids).last_hidden_state
    assert out.shape == (1, 11, 512)
    golden = [
        [-0.28726277, -1.9241608, -0.3058734],
        [-1.2737825, -0.13332152, -0.18766522],
        [0.41159445, 0.1191957, -1.3107123],
    ]
    np.testing.assert_allclose(out[0, :3, :3], golden, rtol=0, atol=GOLDEN_TOLERANCE)


def test_logits_of_opt_350m_are_metaseqs(backend):
    tokenizer = OPTTokenizer.from_pretrained(checkpoint("opt-350m"))
    batch = tokenizer(PROMPTS, add_special_tokens=False, padding_side="right")
    out = backend.run(
        backend.load(checkpoint("opt-350m")),
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
    )
    np.testing.assert_allclose(out.logits.mean(-1), MEAN_LOGITS, rtol=0, atol=METASEQ_TOLERANCE)


GREEDY = {
    "opt-125m": [
        "Today is a beautiful day and I want to", "In the city of New York, the city",
        "Paris is the capital of France and the capital",
        "Computers and mobile phones have taken over the",
    ],
    "opt-350m": [
        "Today is a beautiful day and I want to", "In the city of San Francisco, the city",
        "Paris is the capital of France and the capital",
        "Computers and mobile phones have taken over the",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_texts(backend, name):
    """Ten tokens, the first one included; opt-125m without its last norm writes "Rome Canaver"."""
    tokenizer = OPTTokenizer.from_pretrained(checkpoint(name))
    model = backend.load(checkpoint(name))
    prompts = ["Today is a beautiful day and I want", *PROMPTS[1:]]
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="np").input_ids
        made = backend.generate(model, ids, max_length=10)
        texts += tokenizer.batch_decode(made, skip_special_tokens=True)
    assert texts == GREEDY[name]


def test_a_left_padded_batch(backend):
    tokenizer = OPTTokenizer.from_pretrained(checkpoint("opt-350m"))
    model = backend.load(checkpoint("opt-350m"))
    prompts = ["Hello, my dog is a little", "Today, I"]
    batch = tokenizer(prompts, padding_side="left")
    out = backend.generate(
        model, batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=10
    )
    assert tokenizer.batch_decode(out, skip_special_tokens=True) == [
        "Hello, my dog is a little bit of a dork.\nI'm a",
        "Today, I was in the middle of a conversation with a friend",
    ]


def test_half_precision_has_no_nan(backend):
    """transformers #17433: opt-1.3b in float16 gave NaN on left-padded batches."""
    tokenizer = OPTTokenizer.from_pretrained(checkpoint("opt-1.3b"))
    batch = tokenizer(["Who are you?", "Joe Biden is the president of"], padding_side="left")
    model = backend.load(checkpoint("opt-1.3b"), dtype="float16")
    out = backend.run(model, input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert not np.isnan(out.logits[0]).any()
