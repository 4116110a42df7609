"""Training settings."""

import itertools
import math

import numpy as np
import pytest

from opt_core.config import OPTConfig
from opt_core.errors import ConfigError, InputError
from opt_core.params import param_specs
from opt_core.training.config import TrainConfig
from opt_core.training.microbatches import as_batch, split_batch


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(max_steps=110, warmup_steps=10, learning_rate=1.0, min_lr_ratio=0.1)
    rates = [config.learning_rate_at(step) for step in range(111)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1.0
    np.testing.assert_allclose(rates[60], 0.55)
    np.testing.assert_allclose(rates[110], 0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_other_schedules():
    linear = TrainConfig(max_steps=100, lr_schedule="linear", learning_rate=1.0, min_lr_ratio=0.0)
    np.testing.assert_allclose(linear.learning_rate_at(25), 0.75)
    constant = TrainConfig(max_steps=100, lr_schedule="constant", learning_rate=0.5)
    assert constant.learning_rate_at(99) == 0.5


def test_a_polynomial():
    config = TrainConfig(
        max_steps=100, lr_schedule="polynomial", lr_power=2.0, learning_rate=1.0, min_lr_ratio=0.2
    )
    np.testing.assert_allclose(config.learning_rate_at(50), 0.2 + 0.8 * 0.25)


def test_the_published_recipes():
    config = TrainConfig.from_preset("opt-125m")
    assert (config.batch_size, config.max_steps, config.warmup_steps) == (256, 572204, 715)
    assert (config.learning_rate, config.adam_beta2, config.dropout) == (6e-4, 0.95, 0.1)
    assert config.learning_rate_at(config.max_steps) == pytest.approx(6e-5)
    largest = TrainConfig.from_preset("opt-175b")
    assert (largest.batch_size, largest.max_steps, largest.warmup_steps) == (1024, 143051, 178)
    short = TrainConfig.from_preset("opt-1.3b", max_steps=100, batch_size=8)
    assert (short.max_steps, short.warmup_steps, short.sequence_length) == (100, 100, 2048)
    with pytest.raises(ConfigError, match="no training recipe 'opt-1b': expected one of opt-125m"):
        TrainConfig.from_preset("opt-1b")
    with pytest.raises(ConfigError, match="batch_size"):
        TrainConfig.from_preset("opt-125m", batch_size=0)


def test_what_is_trained():
    config = OPTConfig(num_hidden_layers=2)
    everything = TrainConfig().trained_specs(config, "causal_lm")
    assert everything == param_specs(config, "causal_lm")
    frozen = TrainConfig(freeze=("model.decoder.embed_*", "*.layers.0.*"))
    names = [spec.name for spec in frozen.trained_specs(config, "causal_lm")]
    assert not [name for name in names if "embed" in name or ".0." in name]
    assert "model.decoder.layers.1.fc1.weight" in names
    adapted = TrainConfig(lora_rank=4, lora_targets=("fc1",))
    names = {spec.name: spec for spec in adapted.trained_specs(config, "sequence_classification")}
    assert [name.rpartition("layers.")[2] for name in names] == [
        "0.fc1.lora_A.weight", "0.fc1.lora_B.weight", "1.fc1.lora_A.weight", "1.fc1.lora_B.weight",
        "score.weight",
    ]  # fmt: skip
    b = names["model.decoder.layers.0.fc1.lora_B.weight"]
    assert (b.shape, b.axes, b.decays) == ((3072, 4), ("ffn", "rank"), True)
    for freeze, message in ((("fc9",), "no parameter is called 'fc9'"), (("*",), "nothing is")):
        with pytest.raises(ConfigError, match=message):
            TrainConfig(freeze=freeze).trained_specs(config, "causal_lm")


def test_parts_of_a_batch_add_up():
    """Parts that say more weigh more, so that their mean is that of the whole batch."""
    labels = np.full((4, 5), -100)
    labels[0], labels[3, 2] = 7, 8
    batch = as_batch({"input_ids": np.zeros((4, 5), int), "labels": labels})
    cut = list(split_batch(batch, 4, True))
    assert [share for _, share in cut] == [4 / 5, 1 / 5]
    assert cut[1][0]["labels"].tolist() == labels[3:].tolist()
    assert [share for _, share in split_batch(batch, 1, True)] == [1.0]
    rows = as_batch({"input_ids": np.zeros((4, 5), int), "labels": np.array([1, -100, 0, 2])})
    assert [share for _, share in split_batch(rows, 2, False)] == [1 / 3, 2 / 3]
    with pytest.raises(InputError, match="4 rows cannot be computed in 3 equal parts"):
        list(split_batch(rows, 3, False))
    with pytest.raises(InputError, match="expected input_ids, received labels"):
        as_batch({"labels": labels})
    nothing = {"input_ids": labels, "labels": np.full((4, 5), -100)}
    with pytest.raises(InputError, match="expected labels that are not -100"):
        list(split_batch(nothing, 2, True))


def test_dropout_seeds_differ():
    seeds = {TrainConfig(seed=s).dropout_seed(i, j) for s in (0, 1) for i in (0, 1) for j in (0, 1)}
    assert len(seeds) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 3}, "does not divide batch_size=8"),
        ({"precision": "float16"}, "precision: expected float32 or bfloat16"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing: expected True or False"),
        ({"dropout": 1.0}, "dropout: expected 0 <= x < 1"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"lora_rank": 2, "lora_targets": ("attn",)}, "lora_targets: expected some of q_proj"),
        ({"lora_rank": 2, "freeze": ("*",)}, "freeze and lora_rank"),
        ({"freeze": "fc1"}, "freeze: expected names"),
        ({"patience": 2}, "patience needs validations"),
        ({"keep_checkpoints": 0}, "keep_checkpoints: expected an integer >= 1"),
        ({"lr_power": 0}, "lr_power"),
        ({"max_steps": 0}, "max_steps: expected an integer >= 1"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"sequence_length": 1}, "sequence_length"),
        ({"learning_rate": 0}, "learning_rate: expected a number > 0"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"weight_decay": 1.5}, "weight_decay"),
        ({"adam_beta2": -0.1}, "adam_beta2"),
        ({"adam_beta1": 1.0}, "adam_beta1: expected 0 <= x < 1"),
        ({"learning_rate": "1e-4"}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"lr_schedule": "exponential"}, "lr_schedule"),
        ({"warmup_steps": 2000}, "warmup_steps=2000 exceeds max_steps=1000"),
    ],
    ids=str,
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)
