"""The parameter list: published counts, names, and what follows from them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from opt_core.config import OPTConfig
from opt_core.dialects import KERAS, NNX, TORCH, follow
from opt_core.initialization import initial_value
from opt_core.params import Head, count_parameters, param_specs
from tests.support.configs import CONFIGS

PUBLISHED = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
    "galactica-30b": 29_968_103_424,
    "galactica-120b": 121_328_947_200,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_parameter_counts(preset):
    assert count_parameters(OPTConfig.from_preset(preset)) == PUBLISHED[preset]


@pytest.mark.parametrize("variant", CONFIGS)
def test_names_are_unique_and_axes_fit(variant):
    specs = param_specs(CONFIGS[variant].replace(tie_word_embeddings=False))
    assert len({s.name for s in specs}) == len(specs)
    assert all(len(s.axes) == len(s.shape) for s in specs)


def test_what_each_option_adds_or_removes():
    def names(head: Head = "causal_lm", **changes: Any) -> set[str]:
        return {s.name for s in param_specs(CONFIGS["pre_ln"].replace(**changes), head)}

    base = names()
    assert names(tie_word_embeddings=False) - base == {"lm_head.weight"}
    final = {f"model.decoder.final_layer_norm.{leaf}" for leaf in ("weight", "bias")}
    assert base - names(_remove_final_layer_norm=True) == final
    assert base - names(do_layer_norm_before=False) == final
    assert {n.split(".")[-2] for n in names(word_embed_proj_dim=24) - base} == {
        "project_in",
        "project_out",
    }
    assert all("norm" in n for n in base - names(layer_norm_elementwise_affine=False))
    assert all(n.endswith("bias") and "norm" not in n for n in base - names(enable_bias=False))
    assert names("sequence_classification") - base == {"score.weight"}
    assert names("question_answering") - base == {"qa_outputs.weight", "qa_outputs.bias"}
    assert names("none") == base


def test_weight_decay_spares_norms_and_biases():
    decayed = {s.name for s in param_specs(CONFIGS["post_ln"]) if s.decays}
    assert all(n.endswith("weight") and "norm" not in n for n in decayed)
    assert "model.decoder.embed_tokens.weight" in decayed
    assert "model.decoder.layers.0.fc1.weight" in decayed


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        (TORCH, ("model", "decoder", "layers", "1", "fc1", "weight", (56, 32), ("ffn", "hidden"))),
        (KERAS, ("model", "decoder", "blocks", "1", "fc1", "weight", (56, 32), ("ffn", "hidden"))),
        (NNX, ("model", "decoder", "layers", "1", "fc1", "weight", (56, 32), ("ffn", "hidden"))),
    ],
)
def test_a_linear_weight_in_each_dialect(dialect, expected):
    specs = {s.name: s for s in param_specs(CONFIGS["pre_ln"])}
    spec = specs["model.decoder.layers.1.fc1.weight"]
    assert (*dialect.path(spec), spec.shape, spec.axes) == expected


@pytest.mark.parametrize(
    ("name", "keras", "nnx"),
    [
        ("embed_tokens.weight", "embeddings", "embedding"),
        ("final_layer_norm.weight", "gamma", "scale"),
        ("final_layer_norm.bias", "beta", "bias"),
        ("layers.0.fc2.bias", "bias", "bias"),
    ],
)
def test_leaves_in_each_dialect(name, keras, nnx):
    specs = {s.name: s for s in param_specs(CONFIGS["pre_ln"])}
    spec = specs[f"model.decoder.{name}"]
    assert (KERAS.path(spec)[-1], NNX.path(spec)[-1]) == (keras, nnx)


@pytest.mark.parametrize("head", ["none", "causal_lm"])
def test_a_parameter_is_found_in_a_model(head):
    """By attributes and indices; a bare model is what the others keep as `model`."""
    weight = object()
    fc1 = SimpleNamespace(weight=weight)
    block = SimpleNamespace(fc1=fc1)
    bare = SimpleNamespace(decoder=SimpleNamespace(blocks=[None, block]), head="none")
    model = bare if head == "none" else SimpleNamespace(model=bare, head=head)
    specs = {s.name: s for s in param_specs(CONFIGS["pre_ln"])}
    spec = specs["model.decoder.layers.1.fc1.weight"]
    assert KERAS.owner(model, spec) == (fc1, "weight")
    assert KERAS.parent(model, spec) == (block, "fc1")
    assert follow(model, KERAS.path(spec, head)) is weight


def test_initial_values_do_not_depend_on_the_order():
    config = CONFIGS["pre_ln"]
    specs = param_specs(config)
    forwards = {s.name: initial_value(s, config, 1) for s in specs}
    backwards = {s.name: initial_value(s, config, 1) for s in reversed(specs)}
    assert all(np.array_equal(forwards[n], backwards[n]) for n in forwards)
    first, second = (forwards[f"model.decoder.layers.{i}.fc1.weight"] for i in (0, 1))
    assert not np.array_equal(first, second)
    without_pad = config.replace(pad_token_id=None)
    assert initial_value(specs[0], without_pad, 1)[1].any()
    assert not forwards[specs[0].name][1].any()
