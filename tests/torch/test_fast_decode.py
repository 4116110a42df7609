"""PyTorch's decode step without modules: the same bits; left to modules where it is not plain."""

import pytest

torch = pytest.importorskip("torch")

import opt_torch  # noqa: E402
from opt_torch import lora  # noqa: E402
from opt_torch.generation import fast_decode  # noqa: E402
from opt_torch.generation.loop import decode_step  # noqa: E402
from opt_torch.generation.prefill import prefill  # noqa: E402
from tests.support.configs import CONFIGS  # noqa: E402
from tests.support.reference import make_mask, make_prompts  # noqa: E402


def model_of(folder, variant="pre_ln", **options):
    return opt_torch.OPTForCausalLM.from_pretrained(folder(variant), **options)


def steps(model, step, lengths, count=3):
    """Logits after each of some steps behind prompts padded to 7 tokens; all rows read the same."""
    ids = torch.from_numpy(make_prompts(model.config, len(lengths), 7)).long()
    mask = None if min(lengths) == 7 else torch.from_numpy(make_mask("left", lengths)).bool()
    seen = []
    with torch.no_grad():
        _, cache = prefill(model, ids, mask, model.init_cache(len(ids), 7 + count))
        for token in range(3, 3 + count):
            logits, cache = step(torch.full((len(ids),), token), cache)
            seen.append(logits)
    return seen


def assert_same(model, *lengths):
    with torch.no_grad():
        lean = fast_decode.make_step(model)
    assert lean is not None
    plain = steps(model, lambda ids, cache: decode_step(model, ids, cache), lengths)
    for ours, theirs in zip(steps(model, lean, lengths), plain, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("variant", CONFIGS)
def test_it_computes_what_the_modules_do(folder, variant):
    assert_same(model_of(folder, variant), 7)
    assert_same(model_of(folder, variant), 7, 4, 1)


@pytest.mark.parametrize(
    "options",
    [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"dtype": "float64"}, {"quantize": "int8"},
     {"quantize": "int4"}, {"quantize": "int8", "dtype": "bfloat16"}],
    ids=lambda options: "-".join(options.values()),
)  # fmt: skip
def test_in_every_type(folder, options):
    assert_same(model_of(folder, **options), 7, 3)


@pytest.mark.parametrize("variant", CONFIGS)
def test_rows_of_different_lengths(folder, variant):
    """Some rows of a cache, each behind tokens of its own; the others' slots stay as they are."""
    model = model_of(folder, variant, dtype="float64")
    ids = torch.from_numpy(make_prompts(model.config, 3, 7)).long()
    rows, places = [2, 0], [6, 3]
    with torch.no_grad():
        _, cache = prefill(model, ids, None, model.init_cache(3, 9))
        for row, place in zip(rows, places, strict=True):
            for buffer in (*cache.keys, *cache.values):
                buffer[row, :, place:] = 100  # what nobody may look at
        before = [buffer[1].clone() for buffer in (*cache.keys, *cache.values)]
        lean = fast_decode.make_rows_step(model)
        assert lean is not None
        logits = lean(ids[rows, places], cache.keys, cache.values, rows, places)
        for found, row, place in zip(logits, rows, places, strict=True):
            alone = model(ids[row : row + 1, : place + 1]).logits[0, -1]
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-12)
    for buffer, old in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(buffer[1], old)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_uses_it(folder, monkeypatch, beams):
    model, made = model_of(folder), []
    monkeypatch.setattr(
        fast_decode._DecodeLayer, "__call__", lambda *args: made.append(1) or args[1]
    )
    ids = make_prompts(model.config, 1, 5)
    model.generate(ids, num_beams=beams, max_new_tokens=4, eos_token_id=None)
    assert len(made) == 3 * model.config.num_hidden_layers


def train(model):
    model.train()


def hook(model):
    model.model.decoder.layers[0].fc1.register_forward_hook(lambda *_: None)


def early_hook(model):
    model.lm_head.register_forward_pre_hook(lambda *_: None)


def adapt(model):
    lora.apply(model, 2)


def overridden(model):
    layer = model.model.decoder.layers[1]
    layer.forward = layer.forward


def subclass(model):
    class Other(torch.nn.LayerNorm): ...

    model.model.decoder.layers[0].final_layer_norm.__class__ = Other


@pytest.mark.parametrize("change", [train, hook, early_hook, adapt, overridden, subclass])
def test_models_with_something_of_their_own_are_left_to_their_modules(folder, change):
    model = model_of(folder)
    change(model)
    with torch.no_grad():
        assert fast_decode.make_step(model) is None


def test_surroundings_that_change_products_are_left_to_the_modules(folder):
    model = model_of(folder)
    assert fast_decode.make_step(model) is None, "a gradient may be wanted"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fast_decode.make_step(model) is None
    with torch.no_grad():
        seen = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        assert fast_decode.make_step(model) is None
        seen.remove()
        assert fast_decode.make_step(model) is not None
        assert fast_decode.make_step(model_of(folder, attn_implementation="eager")) is None
