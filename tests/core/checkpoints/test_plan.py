"""Comparing a checkpoint with a configuration and a head, then streaming it."""

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from opt_core.checkpoints.load import Checkpoint, open_checkpoint
from opt_core.checkpoints.plan import plan_load
from opt_core.errors import CheckpointError
from opt_core.params import Head, param_specs
from tests.support.files.checkpoint_fixtures import (
    EMBEDDING,
    PROJECTED,
    TINY,
    UNTIED,
    Cut,
    assert_same,
    loaded,
    plan,
    random_weights,
    write,
    write_sharded,
)

POSITIONS = "model.decoder.embed_positions.weight"
FINAL_NORM = "model.decoder.final_layer_norm"


@pytest.fixture
def tiny(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write(tmp_path / "tiny", random_weights()))


def test_everything_that_does_not_fit_is_in_one_error(tmp_path):
    weights = random_weights()
    for i in range(2):
        del weights[f"model.decoder.layers.{i}.fc1.bias"]
    weights["model.decoder.surprise"] = np.ones(1, np.float32)
    weights["model.decoder.evil\nname"] = np.ones(1, np.float32)
    weights[EMBEDDING] = weights[EMBEDDING][:20]
    weights[f"{FINAL_NORM}.bias"] = np.ones(8, np.int8)
    with pytest.raises(CheckpointError) as caught:
        plan(write(tmp_path, weights))
    message = str(caught.value)
    for part in (
        str(tmp_path),
        "2 missing: model.decoder.layers.{0-1}.fc1.bias;",
        r"2 unexpected: model.decoder.surprise, 'model.decoder.evil\nname';",
        f"1 of another shape: {EMBEDDING} (expected [21, 8], received [20, 8]);",
        f"1 of another type: {FINAL_NORM}.bias (int8 is no floating-point type).",
        "set vocab_size to 20 in config.json",
    ):
        assert part in message
    assert "\n" not in message


def test_a_long_list_is_counted_and_shortened(tiny):
    with pytest.raises(CheckpointError, match=r"16 missing: (\S+ ?){8}and 8 more kinds\. "):
        plan_load(tiny, TINY.replace(num_hidden_layers=3), "causal_lm")


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"vocab_size": 20}, "set vocab_size to 21 in"),
        ({"max_position_embeddings": 12}, "drop the position table's first 2 rows"),
        ({"max_position_embeddings": 20}, "set max_position_embeddings to 10 in"),
        ({"word_embed_proj_dim": 6}, "lacks project_in and project_out: check word_embed_proj_dim"),
        ({"enable_bias": False}, "set enable_bias to true in"),
        ({"layer_norm_elementwise_affine": False}, "set layer_norm_elementwise_affine to true in"),
        ({"num_hidden_layers": 1}, "the checkpoint has 2 layers: set num_hidden_layers to 2 in"),
        ({"num_hidden_layers": 4}, "the checkpoint has 2 layers: set num_hidden_layers to 2 in"),
        ({"_remove_final_layer_norm": True}, "check do_layer_norm_before and _remove_final"),
        ({"do_layer_norm_before": False}, "check do_layer_norm_before and _remove_final"),
        ({"ffn_dim": 8}, None),
    ],
)
def test_hints_name_the_likely_cause_and_no_other(tiny, changes, hint):
    with pytest.raises(CheckpointError) as caught:
        plan_load(tiny, TINY.replace(**changes), "causal_lm")
    _, _, hints = str(caught.value).rpartition(". ")
    if hint is None:
        assert "config.json" not in str(caught.value)
    else:
        assert hint in hints
        if "word_embed_proj_dim" not in changes:
            assert "; " not in hints


@pytest.mark.parametrize(
    ("flag", "config"),
    [("enable_bias", TINY), ("layer_norm_elementwise_affine", TINY)],
)
def test_hints_when_the_file_lacks_what_the_configuration_wants(tmp_path, flag, config):
    weights = random_weights(config.replace(**{flag: False}))
    with pytest.raises(CheckpointError, match=f"set {flag} to false in config.json") as caught:
        plan(write(tmp_path, weights), config)
    assert "17785" not in str(caught.value)


def test_a_projection_the_configuration_does_not_know(tmp_path):
    folder = write(tmp_path, random_weights(PROJECTED))
    with pytest.raises(CheckpointError, match="set word_embed_proj_dim to 6 in"):
        plan(folder, PROJECTED.replace(word_embed_proj_dim=8))


def test_a_lost_final_norm_is_an_error_that_says_so(tmp_path):
    weights = random_weights()
    del weights[f"{FINAL_NORM}.weight"], weights[f"{FINAL_NORM}.bias"]
    folder = write(tmp_path, weights)
    with pytest.raises(CheckpointError, match=r"pull/17785.*\"_remove_final_layer_norm\": true"):
        plan(folder)
    assert_same(loaded(plan(folder, TINY.replace(_remove_final_layer_norm=True))), weights)


def test_absent_layers_say_nothing_about_their_biases(tmp_path):
    weights = {name: array for name, array in random_weights().items() if ".layers." not in name}
    with pytest.raises(CheckpointError, match="32 missing") as caught:
        plan(write(tmp_path, weights))
    assert "config.json" not in str(caught.value)


def test_a_hostile_layer_number(tmp_path):
    weights = random_weights()
    weights[f"model.decoder.layers.{'9' * 5000}.fc1.weight"] = np.ones(1, np.float32)
    weights["model.decoder.layers.999999.fc1.weight"] = np.ones(1, np.float32)
    with pytest.raises(CheckpointError, match="2 unexpected"):
        plan(write(tmp_path, weights))


HEADS: list[Head] = ["none", "causal_lm", "sequence_classification", "question_answering"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("stored_head", HEADS)
def test_a_checkpoint_of_one_head_loads_into_another(tmp_path, stored_head, head):
    weights = random_weights(TINY, stored_head)
    result = plan(write(tmp_path, weights), TINY, head)
    own = {spec.name for spec in param_specs(TINY, head)}
    assert_same(loaded(result), {name: weights[name] for name in weights if name in own})
    assert {spec.name for spec in result.fresh} == own - weights.keys()
    assert bool(result.fresh) == (head not in (stored_head, "none", "causal_lm"))
    assert result.config == TINY


def test_part_of_a_head_is_an_error(tmp_path):
    weights = random_weights(TINY, "question_answering")
    del weights["qa_outputs.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing: qa_outputs\.bias"):
        plan(write(tmp_path, weights), TINY, "question_answering")


def test_a_head_of_another_number_of_labels_is_an_error(tmp_path):
    folder = write(tmp_path, random_weights(TINY, "sequence_classification"))
    with pytest.raises(CheckpointError, match=r"score.weight \(expected \[5, 8\], received \[2, 8"):
        plan(folder, TINY.replace(num_labels=5), "sequence_classification")


@pytest.mark.parametrize("rows_at_once", [1 << 26, 64, 1])
def test_a_tied_head_with_equal_contents_is_not_loaded(tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr("opt_core.checkpoints.load._COMPARED_BYTES", rows_at_once)
    weights = random_weights()
    result = plan(write(tmp_path, weights | {"lm_head.weight": weights[EMBEDDING]}))
    assert result.config.tie_word_embeddings
    assert_same(loaded(result), weights)
    different = weights[EMBEDDING].copy()
    different[-1, -1] += 1
    result = plan(write(tmp_path, weights | {"lm_head.weight": different}))
    assert not result.config.tie_word_embeddings
    assert_same(loaded(result), weights | {"lm_head.weight": different})


def test_a_tied_head_in_the_same_storage_is_not_even_read(tmp_path, monkeypatch):
    weights: dict[str, Any] = dict(random_weights())
    weights["lm_head.weight"] = Cut(EMBEDDING, 0, (21, 8), (8, 1))
    checkpoint = open_checkpoint(write(tmp_path, weights, "pytorch_model.bin"))
    monkeypatch.setattr(
        "opt_core.checkpoints.tensors.StoredTensor.read", lambda self: pytest.fail("read")
    )
    assert plan_load(checkpoint, TINY, "causal_lm").config.tie_word_embeddings


def test_a_different_head_under_a_tied_configuration_is_honoured(tmp_path):
    weights = random_weights(UNTIED)
    result = plan(write(tmp_path, weights), TINY)
    assert result.config == UNTIED
    assert_same(loaded(result), weights)


@pytest.mark.parametrize("head", ["none", "sequence_classification", "question_answering"])
def test_other_heads_leave_the_language_model_head_alone(tmp_path, head):
    result = plan(write(tmp_path, random_weights(UNTIED)), TINY, head)
    assert result.config == TINY
    assert "lm_head.weight" not in loaded(result)


def test_an_untied_configuration_needs_its_head(tiny):
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight\. .* does not tie"):
        plan_load(tiny, UNTIED, "causal_lm")


def test_a_tied_head_of_another_shape_is_an_error(tmp_path):
    weights = random_weights()
    weights["lm_head.weight"] = weights[EMBEDDING][:20]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight \(expected \[21, 8\], received"):
        plan(write(tmp_path, weights))


def test_stream_maps_what_needs_no_cast_and_casts_the_rest(tmp_path):
    weights = random_weights()
    result = plan(write(tmp_path, weights))
    for (_, a), (_, b) in zip(result.stream(), result.stream("float32"), strict=True):
        assert np.shares_memory(a, b)
    for spec, array in result.stream("bfloat16"):
        np.testing.assert_array_equal(array, weights[spec.name].astype(ml_dtypes.bfloat16))
    with pytest.raises(CheckpointError, match="received 'int4'"):
        next(result.stream("int4"))


def test_stream_follows_the_files_and_reports_progress(tmp_path):
    weights = dict(reversed(random_weights().items()))
    result = plan(write_sharded(tmp_path, weights))
    calls: list[tuple[int, int]] = []
    names = [spec.name for spec, _ in result.stream(progress=lambda *call: calls.append(call))]
    assert names == list(weights)
    sizes = np.cumsum([array.nbytes for array in weights.values()]).tolist()
    assert calls == [(size, sizes[-1]) for size in sizes]


def test_a_cast_out_of_range_names_the_tensor(tmp_path):
    weights = random_weights()
    weights[POSITIONS][0, 0] = 1e30
    with pytest.raises(CheckpointError, match=rf"{re.escape(POSITIONS)}: values beyond the range"):
        loaded(plan(write(tmp_path, weights)), "float16")
