"""A class of a user's own extends a model by layers: files hold them, as with `transformers`."""

import importlib

import numpy as np
import pytest

from opt_core.errors import InputError, MismatchError
from tests.support.backends import BACKENDS
from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts

CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
IDS = make_prompts(CONFIG, 1, 4)
WIDTH = 3


def torch_layers():
    nn = importlib.import_module("torch.nn")
    return [nn.Linear(WIDTH, 5), nn.BatchNorm1d(5)]


def tf_layers():
    layers = importlib.import_module("keras").layers
    head = [layers.Dense(5), layers.BatchNormalization()]
    head[0].build((None, WIDTH))
    head[1].build((None, 5))
    return head


def flax_layers():
    nnx = importlib.import_module("flax.nnx")
    return [nnx.Linear(WIDTH, 5, rngs=nnx.Rngs(0)), nnx.BatchNorm(5, rngs=nnx.Rngs(0))]


LAYERS = {"torch": torch_layers, "tf": tf_layers, "flax": flax_layers}
HEADS = {
    "torch": ("weight", "bias", "weight", "bias", "running_mean", "running_var"),
    "tf": ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance"),
    "flax": ("kernel", "bias", "scale", "bias", "mean", "var"),
}
"""Names that the framework gives a linear layer's parameters, and a norm's with its statistics."""


@pytest.fixture
def scored(backend):
    base = backend.model_class("causal_lm")

    class Scored(base):
        def __init__(self, config):
            super().__init__(config)
            self.v_head, self.norm = LAYERS[backend.name]()

    return Scored


def fill(model):
    """Gives each own layer other values; returns them."""
    values = {
        name: np.arange(np.prod(value.shape), dtype=np.float32).reshape(value.shape) + i
        for i, (name, value) in enumerate(model._own_tensors().items())
        if "num_batches" not in name
    }
    model._put_own(values)
    return values


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}, {"variant": "own"}])
def test_they_are_saved_and_loaded(backend, scored, folder, tmp_path, options):
    with pytest.warns(UserWarning, match=r"no .*norm.* layers of Scored are freshly initialised"):
        made = scored.from_pretrained(folder(CONFIG))
    values = fill(made)
    assert {name.rpartition(".")[2] for name in values} == set(HEADS[backend.name])
    made.save_pretrained(tmp_path, **options)
    variant = {"variant": options["variant"]} if "variant" in options else {}
    again, info = scored.from_pretrained(tmp_path, output_loading_info=True, **variant)
    assert not any(info.values())
    own = again._own_tensors()
    for name, value in values.items():
        np.testing.assert_array_equal(again._own_array(own[name]), value)
    expected, found = (backend.run(m, input_ids=IDS).logits for m in (made, again))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*freshly initialised")
def test_classes_without_them_leave_them_aside(backend, scored, folder, tmp_path):
    made = scored.from_pretrained(folder(CONFIG))
    made.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"left aside, as no part of OPT: .*v_head"):
        plain = backend.load(tmp_path)
    expected, found = (backend.run(m, input_ids=IDS).logits for m in (made, plain))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*freshly initialised")
def test_another_shape_and_parts_of_the_model_are_refused(backend, scored, folder, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    scored.from_pretrained(folder(CONFIG)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = safetensors.load_file(file)
    name = next(name for name in weights if name.startswith("v_head.bias"))
    safetensors.save_file(weights | {name: np.ones(7, np.float32)}, file)
    with pytest.raises(MismatchError, match=r"v_head\.bias: Scored expects \[5\], received \[7\]"):
        scored.from_pretrained(tmp_path)
    extra = "model.decoder.layers.0.surprise"
    safetensors.save_file(weights | {extra: np.ones(7, np.float32)}, file)
    with pytest.raises(MismatchError, match=rf"{extra}: neither OPT nor Scored has such a"):
        scored.from_pretrained(tmp_path)


def test_layers_put_on_a_model_of_ours_are_named_where_files_leave_them_out(
    backend, folder, tmp_path
):
    made = backend.load(folder(CONFIG))
    made.extra = LAYERS[backend.name]()[0]
    with pytest.warns(UserWarning, match=r"layers of its own are not written, .*: extra\."):
        made.save_pretrained(tmp_path)
    assert not backend.load(tmp_path)._own_tensors()


@pytest.mark.filterwarnings("ignore:.*freshly initialised")
@pytest.mark.skipif("flax" not in BACKENDS, reason="Flax' parameters outside of a model")
def test_flaxs_params_have_them_too(folder):
    jax = pytest.importorskip("jax")
    base = importlib.import_module("opt_flax").FlaxOPTForCausalLM

    class Scored(base):
        def __init__(self, config, **options):
            super().__init__(config, **options)
            self.v_head, self.norm = flax_layers()

        def __call__(self, *args, **kwargs):
            out = super().__call__(*args, **kwargs)
            out["value"] = self.v_head(out.logits[..., :WIDTH])
            return out

    model = Scored.from_pretrained(folder(CONFIG))
    params = model.params
    assert params["v_head"]["kernel"].shape == (WIDTH, 5)
    assert set(params["norm"]) == {"bias", "scale"}  # and no statistics, which are not trained
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), model.params_shape_tree) == shapes
    slope = jax.jit(jax.grad(lambda params: model(IDS, params=params)["value"].sum()))(params)
    expected = np.asarray(model(IDS).logits[..., :WIDTH]).sum((0, 1))
    found = np.asarray(slope["v_head"]["kernel"])
    np.testing.assert_allclose(found, expected[:, None].repeat(5, 1), rtol=1e-5)
    other = {**params, "v_head": {"kernel": np.zeros((WIDTH, 5)), "bias": np.ones(5)}}
    np.testing.assert_array_equal(model(IDS, params=other)["value"], 1)
    assert np.any(np.asarray(model(IDS)["value"]) != 1)
    model.params = other
    np.testing.assert_array_equal(model(IDS)["value"], 1)
    with pytest.raises(InputError, match=r"params: 2 missing, such as v_head/"):
        model(IDS, params={name: params[name] for name in ("model", "norm")})
    wrong = {**params, "v_head": {**params["v_head"], "bias": np.ones(4)}}
    with pytest.raises(InputError, match=r"v_head/bias: expected shape \(5,\), received \(4,\)"):
        model(IDS, params=wrong)


@pytest.mark.filterwarnings("ignore:.*freshly initialised")
@pytest.mark.skipif("torch" not in BACKENDS, reason="PyTorch's files")
def test_pytorchs_files_hold_them_too(folder, tmp_path):
    torch = pytest.importorskip("torch")
    base = importlib.import_module("opt_torch").OPTForSequenceClassification

    class Gated(base):
        def __init__(self, config):
            super().__init__(config)
            self.v_head = torch.nn.Linear(2, 2)
            self.gate = torch.nn.Parameter(torch.zeros(3))
            self.model.decoder.layers[0].adapter = torch.nn.Linear(2, 2)
            self.register_buffer("steps", torch.tensor(0))
            self.register_buffer("scratch", torch.zeros(1), persistent=False)

    made = Gated.from_pretrained(folder(CONFIG))
    with torch.no_grad():
        made.gate += 2
        made.v_head.bias.fill_(3)
        made.model.decoder.layers[0].adapter.bias.fill_(4)
    made.steps += 5
    made.save_pretrained(tmp_path, safe_serialization=False)
    again = Gated.from_pretrained(tmp_path, dtype="bfloat16")
    assert again.gate.tolist() == [2.0] * 3
    assert again.gate.dtype is again.dtype is torch.bfloat16
    assert again.v_head.bias.tolist() == [3.0] * 2
    assert again.model.decoder.layers[0].adapter.bias.tolist() == [4.0] * 2
    assert (again.steps.item(), again.steps.dtype) == (5, torch.int64)
    saved = torch.load(tmp_path / "pytorch_model.bin")
    assert "scratch" not in saved
    assert saved["steps"].shape == ()
    given = {"gate": torch.full((3,), 9.0)}
    made.save_pretrained(tmp_path, state_dict=made.state_dict() | given)
    (tmp_path / "pytorch_model.bin").unlink()
    assert Gated.from_pretrained(tmp_path).gate.tolist() == [9.0] * 3
    with pytest.raises(MismatchError, match=r"unexpected: .*layers\.0\.adapter"):
        base.from_pretrained(tmp_path)  # what is within OPT's layers changes what they compute
