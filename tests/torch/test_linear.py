"""PyTorch's linear layers: oneDNN's products, packed weights, and bfloat16 without instructions."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import opt_torch  # noqa: E402
from opt_torch import _private, linear  # noqa: E402
from opt_torch.serving.engine import Engine  # noqa: E402
from tests.support.configs import CONFIGS  # noqa: E402
from tests.support.reference import make_prompts  # noqa: E402


def model_of(folder, **options):
    return opt_torch.OPTForCausalLM.from_pretrained(folder("pre_ln"), **options)


def packs():
    """Whether this machine's oneDNN computes in bfloat16, which is what packing is for."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


LONG = {"max_new_tokens": 40, "eos_token_id": None}


def is_packed(model):
    return model.get_decoder().layers[0].fc1 in linear._PACKED


def test_weights_are_packed_for_the_length_of_a_generation(folder):
    model, ids = model_of(folder, dtype="bfloat16"), make_prompts(CONFIGS["pre_ln"], 2, 5)
    stream = model.stream(ids, **LONG)
    next(stream)
    assert is_packed(model) == packs()
    list(stream)
    assert not is_packed(model)
    abandoned = model.stream(ids, **LONG)
    next(abandoned)
    del abandoned
    assert not is_packed(model)
    next(model.stream(ids, **{**LONG, "max_new_tokens": 2}))
    assert not is_packed(model), "two tokens are not worth it"
    full = model_of(folder)
    next(full.stream(ids, **LONG))
    assert not is_packed(full), "float32 weights are read where they lie"


def test_packing_needs_memory(folder, monkeypatch):
    model, ids = model_of(folder, dtype="bfloat16"), make_prompts(CONFIGS["pre_ln"], 2, 5)
    monkeypatch.setattr(linear, "available_memory", lambda: 1000.0)
    stream = model.stream(ids, **LONG)
    next(stream)
    assert not is_packed(model)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_packed_weights_generate_what_plain_ones_do(folder, monkeypatch, num_beams):
    model, ids = model_of(folder, dtype="bfloat16"), make_prompts(CONFIGS["pre_ln"], 2, 5)
    packed = model.generate(ids, num_beams=num_beams, **LONG)
    monkeypatch.setattr(linear, "available_memory", lambda: 0.0)
    plain = model.generate(ids, num_beams=num_beams, **LONG)
    assert torch.equal(packed, plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generating_between_backward_and_step_loses_nothing(folder, dtype):
    from opt_core import TrainConfig
    from opt_torch.training import make_optimizer

    ids, results = make_prompts(CONFIGS["pre_ln"], 2, 9), []
    for samples in (False, True):
        model = model_of(folder, dtype=dtype)
        optimizer = make_optimizer(model, TrainConfig(learning_rate=1e-2))
        for _ in range(3):
            model(ids, labels=ids).loss.backward()
            if samples:
                model.generate(ids, **LONG)
            optimizer.step()
            optimizer.zero_grad()
        results.append({name: p.clone() for name, p in model.named_parameters()})
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


def test_changed_weights_are_used_at_once(folder):
    model, ids = model_of(folder, dtype="bfloat16"), make_prompts(CONFIGS["pre_ln"], 2, 5)
    before = model.generate(ids, **LONG)
    fc1 = model.get_decoder().layers[0].get_parameter("fc1.weight")
    fc1.data[3] += 1.0  # which no version counter sees
    after = model.generate(ids, **LONG)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, model_like(model).generate(ids, **LONG))
    model.get_decoder().embed_tokens.weight.data.zero_()
    with torch.no_grad():
        assert model(ids).logits.abs().max() == 0


def model_like(model):
    """Another model with the same weights, which has packed nothing."""
    other = type(model)(model.config).to(model.dtype)
    other.load_state_dict(model.state_dict())
    return other


def test_packed_weights_are_kept_until_training(folder):
    model, ids = model_of(folder, dtype="bfloat16"), make_prompts(CONFIGS["pre_ln"], 2, 5)
    first = model.generate(ids, **LONG)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    kept = [linear._KEPT.get(layer) for layer in layers]
    assert all((pair is not None) == packs() for pair in kept)
    assert torch.equal(model.generate(ids, **LONG), first)
    again = [linear._KEPT.get(layer) for layer in layers]
    assert all(a is b for a, b in zip(again, kept, strict=True))
    model.train()
    assert not any(layer in linear._KEPT for layer in layers)
    model.eval().generate(ids, **LONG)
    model.to(torch.float32)
    assert not any(layer in linear._KEPT for layer in layers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_onednn_products_are_pytorchs(folder, dtype):
    """Without a gradient oneDNN computes, with one PyTorch does."""
    model, ids = model_of(folder, dtype=dtype), make_prompts(CONFIGS["pre_ln"], 2, 5)
    with torch.no_grad():
        ours = model(ids).logits.float()
    error = 2e-5 if dtype == "float32" else 0.2
    torch.testing.assert_close(ours, model(ids).logits.float(), rtol=0, atol=error)


def test_autocast_pruning_and_transforms_still_work(folder):
    from torch.nn.utils import prune

    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 2, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(ids).logits.dtype == torch.bfloat16
        model.generate(ids, **LONG)
    layer = model.get_decoder().layers[0]
    assert isinstance(layer, torch.nn.Module)
    eager = model_of(folder, attn_implementation="eager")  # the fused kernel has no forward mode
    embeds = torch.randn(2, 5, 32)
    with torch.no_grad():
        _, tangent = torch.func.jvp(
            lambda x: eager(inputs_embeds=x).logits, (embeds,), (torch.randn(2, 5, 32),)
        )
        assert tangent.abs().max() > 0
        before = model(ids).logits
        prune.l1_unstructured(layer.get_submodule("fc1"), "weight", 0.5)
        assert (model(ids).logits - before).abs().max() > 0.01


@pytest.mark.parametrize("rows", [(1, 1), (3, 5)], ids=["one", "many"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
def test_bfloat16_without_instructions_is_rounded_once(monkeypatch, rows, bias):
    """Where the CPU has none, products are float32 ones, a block of the weight at a time."""
    monkeypatch.setattr(linear, "_has_bfloat16", lambda: False)
    monkeypatch.setattr(linear, "BLOCK", 100)
    torch.manual_seed(0)
    layer = torch.nn.Linear(33, 50, bias=bias).to(torch.bfloat16)
    states = torch.randn(*rows, 33).to(torch.bfloat16)
    with torch.no_grad():
        exact = torch.nn.functional.linear(
            states.double(), layer.weight.double(), layer.bias.double() if bias else None
        )
        out = linear.apply_linear(layer, states)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
@pytest.mark.parametrize("out", [40, 50], ids=["divides", "does not"])
@pytest.mark.parametrize("rows", [1, 3, 300])
@pytest.mark.parametrize("processor", ["AVX2", "wider", "wider, AMD's"])
def test_float32_rows_are_multiplied_part_by_part(monkeypatch, processor, rows, out, bias):
    """With wider instructions than AVX2 only a single one is; MKL is not taken for AMD's then."""
    avx2_only, is_slow = processor == "AVX2", processor == "wider, AMD's"
    monkeypatch.setattr(linear, "_has_avx2_only", lambda: avx2_only)
    monkeypatch.setattr(linear, "_is_mkl_slow", lambda: is_slow)
    monkeypatch.setattr(linear, "_COLUMNS", 16)
    torch.manual_seed(0)
    layer, states = torch.nn.Linear(33, out, bias=bias), torch.randn(rows, 1, 33)
    expected = torch.nn.functional.linear(states.double(), layer.weight.double())
    expected = (expected if layer.bias is None else expected + layer.bias).float().detach()
    close = {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        calls, wholes = [], []
        recorder = _Recorder(_private.mkldnn_linear, calls)
        monkeypatch.setattr(_private, "mkldnn_linear", recorder)
        monkeypatch.setattr(linear.F, "linear", _Recorder(torch.nn.functional.linear, wholes))
        for found in (
            linear.apply_linear(layer, states),
            linear.make_linear(layer)(states[:, 0])[:, None],
        ):
            torch.testing.assert_close(found, expected, **close)
        is_whole = out % linear._PARTS > 0 or (rows > 1 and not avx2_only)
        by_mkl = rows > 256 and not is_slow
        assert [bool(calls), bool(wholes)] == [is_whole and not by_mkl, is_whole and by_mkl]
        layer.weight.data = layer.weight.data.T.contiguous().T  # parts of this are no views
        torch.testing.assert_close(linear.apply_linear(layer, states), expected, **close)


@pytest.mark.parametrize("rows", [255, 256])
def test_many_rows_of_a_wide_input_are_multiplied_with_a_whole_weight(monkeypatch, rows):
    monkeypatch.setattr(linear, "_has_avx2_only", lambda: True)
    monkeypatch.setattr(linear, "_is_mkl_slow", lambda: False)
    layer, states, wholes = torch.nn.Linear(48, 48), torch.randn(rows, 48), []
    expected = layer(states)
    monkeypatch.setattr(linear.F, "linear", _Recorder(torch.nn.functional.linear, wholes))
    with torch.no_grad():
        torch.testing.assert_close(
            linear.apply_linear(layer, states), expected, rtol=1e-5, atol=1e-5
        )
    assert len(wholes) == (rows >= linear.MANY_ROWS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engines_multiply_several_rows_with_packed_weights(folder, monkeypatch, dtype):
    """They give the same as where they lie; one float32 row is read there."""
    model, calls = model_of(folder, dtype=dtype), []
    engine = Engine(model, 3)
    if dtype == "bfloat16" and not packs():  # an order that oneDNN has no use for is not made
        assert engine.orders == {}
        return
    first: Any = next(iter(engine.orders.items()))
    layer, packed = first
    assert packed.is_mkldnn, "this test proves less than it should"
    states = torch.randn(5, layer.in_features, dtype=model.dtype)
    with torch.no_grad():
        expected = linear.apply_linear(layer, states)
        recorder = _Recorder(_private.mkldnn_linear, calls)
        monkeypatch.setattr(_private, "mkldnn_linear", recorder)
        with linear.using(engine.orders):
            bound = linear.make_linear(layer)
            for found in (linear.apply_linear(layer, states), bound(states)):
                torch.testing.assert_close(found, expected)
            assert [call[1] is packed for call in calls] == [True, True]
            for found in (linear.apply_linear(layer, states[:1]), bound(states[:1])):
                torch.testing.assert_close(found, expected[:1])
        assert sum(call[1] is packed for call in calls) == (2 if dtype == "float32" else 4)
    assert not linear._PACKED


def test_engines_pack_only_where_memory_allows(folder, monkeypatch):
    monkeypatch.setattr(linear, "available_memory", lambda: 0.0)
    assert Engine(model_of(folder), 3).orders == {}


class _Recorder:
    """A function that keeps a list of its calls."""

    def __init__(self, function, calls):
        self.function, self.calls, self.default = function, calls, self

    def __call__(self, *arguments):
        self.calls.append(arguments)
        return self.function(*arguments)
