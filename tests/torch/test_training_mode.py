"""What only PyTorch has: its attention kernels, training mode, dtypes and modules."""

import math
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import opt_torch  # noqa: E402
from opt_core.config import OPTConfig  # noqa: E402
from opt_core.errors import CheckpointError, ConfigError, InputError  # noqa: E402
from opt_torch import attention  # noqa: E402
from tests.support.configs import CONFIGS  # noqa: E402
from tests.support.reference import make_mask, make_prompts  # noqa: E402


def model_of(folder, variant: str | OPTConfig = "pre_ln", **options):
    return opt_torch.OPTForCausalLM.from_pretrained(folder(variant), **options)


@pytest.fixture
def varlen_on_cpu(monkeypatch):
    """PyTorch's variable-length kernel runs on CUDA only; this one means the same, for packing."""

    def varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size):
        assert window_size == (-1, 0)
        assert longest_q >= starts_q.diff().max()
        assert longest_k >= starts_k.diff().max()
        out = torch.empty_like(q)
        for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
            query, key, value = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
            out[a:b] = attention.eager(query, key, value, None, 0.0)[0][0].transpose(0, 1)
        return out

    monkeypatch.setattr(attention, "varlen_attn", varlen)
    monkeypatch.setattr(attention, "check_flash", lambda device, dtype: None)


@pytest.mark.parametrize(
    "mask", [make_mask("left", [9, 5, 2]), make_mask("right", [9, 5, 2])], ids=["left", "right"]
)
def test_packing_padding_away_changes_no_token(folder, varlen_on_cpu, mask):
    ids = make_prompts(CONFIGS["pre_ln"], 3, 9)
    packed = model_of(folder, attn_implementation="flash_attention_2")(
        ids, attention_mask=mask
    ).logits
    plain = model_of(folder)(ids, attention_mask=mask).logits
    seen = torch.tensor(mask).bool()
    torch.testing.assert_close(packed[seen], plain[seen], rtol=0, atol=2e-5)


def test_packing_works_through_a_cache(folder, varlen_on_cpu):
    ids, mask = make_prompts(CONFIGS["pre_ln"], 3, 9), make_mask("left", [9, 5, 2])
    settings = {"attention_mask": mask, "max_new_tokens": 10, "eos_token_id": None}
    packed = model_of(folder, attn_implementation="flash_attention_2").generate(ids, **settings)
    torch.testing.assert_close(packed, model_of(folder).generate(ids, **settings))


def test_flash_attention_says_where_it_cannot_run(folder):
    with pytest.raises(
        ConfigError, match="needs a CUDA device and float16 or bfloat16, received cpu and float32"
    ):
        model_of(folder, attn_implementation="flash_attention_2")


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [None, make_mask("left", [9, 5, 2])], ids=["bare", "left"])
def test_flash_attention_on_a_gpu(folder, mask):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config = CONFIGS["pre_ln"].replace(hidden_size=128, num_attention_heads=2)
    ids = torch.tensor(make_prompts(config, 3, 9), device="cuda")
    options = {"device": "cuda", "dtype": "float16"}
    flash = model_of(folder, config, attn_implementation="flash_attention_2", **options)
    plain = model_of(folder, config, attn_implementation="eager", **options)
    a, b = (m(ids, attention_mask=mask).logits.float() for m in (flash, plain))
    seen = torch.ones(3, 9).bool() if mask is None else torch.tensor(mask).bool()
    torch.testing.assert_close(a[seen], b[seen], rtol=2e-2, atol=5e-2)


def test_dropout_is_on_in_training_mode_only(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 1, 9)
    still = model(ids).logits
    torch.testing.assert_close(model(ids).logits, still, rtol=0, atol=0)
    model.train()
    torch.manual_seed(0)
    first, second = model(ids).logits, model(ids).logits
    assert (first - second).abs().max() > 0.1
    torch.manual_seed(0)
    torch.testing.assert_close(model(ids).logits, first, rtol=0, atol=0)


@pytest.mark.parametrize("attention_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("where", ["dropout", "attention_dropout", "layerdrop"])
def test_each_dropout_field_acts(folder, where, attention_implementation):
    silent = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
    config = CONFIGS["pre_ln"].replace(**{**silent, where: 0.5})
    model = model_of(folder, config, attn_implementation=attention_implementation).train()
    ids = make_prompts(config, 1, 9)
    torch.manual_seed(0)
    outputs = torch.stack([model(ids).logits for _ in range(12)])
    assert outputs.std(0).max() > 0.01
    quiet = model_of(folder, config.replace(**silent)).train()(ids).logits
    assert (outputs.mean(0) - quiet).abs().max() < 6 * outputs.std(0).max()


@pytest.mark.parametrize("variant", CONFIGS)
def test_gradient_checkpointing_changes_no_gradient(folder, variant):
    ids = make_prompts(CONFIGS[variant], 2, 9)
    grads = []
    for recompute in (False, True):
        model = model_of(folder, variant).train()
        if recompute:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        model.gradient_checkpointing_disable()
        assert not model.get_decoder().gradient_checkpointing
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=0, msg=name)


def test_gradient_checkpointing_really_recomputes(folder):
    model = model_of(folder).train()
    calls = []
    fc1 = model.get_decoder().get_submodule("layers.0.fc1")
    fc1.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    ids = make_prompts(CONFIGS["pre_ln"], 1, 4)
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", CONFIGS)
def test_half_precision_is_near_and_finite(folder, variant, dtype):
    ids, mask = make_prompts(CONFIGS[variant], 3, 9), make_mask("left", [9, 5, 2])
    half = model_of(folder, variant, dtype=dtype)
    assert half.dtype == getattr(torch, dtype)
    logits = half(ids, attention_mask=mask).logits.float()
    full = model_of(folder, variant)(ids, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    seen = torch.tensor(mask).bool()
    assert (logits - full)[seen].abs().max() < (0.8 if dtype == "bfloat16" else 0.1)


def test_tied_weights_are_one_parameter(folder):
    tied, untied = (
        model_of(folder),
        model_of(folder, CONFIGS["pre_ln"].replace(tie_word_embeddings=False)),
    )
    assert tied.lm_head.weight is tied.get_decoder().embed_tokens.weight
    assert untied.num_parameters() - tied.num_parameters() == 99 * 32


def test_the_module_tree_is_the_one_transformers_has(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.OPTForCausalLM.from_pretrained(folder("post_ln"), dtype="float32")
    assert set(model_of(folder, "post_ln").state_dict()) == set(theirs.state_dict())


def test_weights_stay_in_the_file_until_changed(folder):
    model = model_of(folder)
    before = (folder("pre_ln") / "model.safetensors").read_bytes()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert (folder("pre_ln") / "model.safetensors").read_bytes() == before


def test_a_fresh_head_warns(folder):
    config = CONFIGS["pre_ln"].replace(num_labels=5)
    with pytest.warns(
        UserWarning, match=r"no score\.weight in this checkpoint; it is freshly initialised"
    ):
        model = opt_torch.OPTForSequenceClassification.from_pretrained(
            folder("pre_ln"), config=config
        )
    assert model.score.weight.shape == (5, 32)
    assert 0 < model.score.weight.std() < 0.1


def test_a_head_can_be_left_behind(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = folder("post_ln", "sequence_classification")
        model = opt_torch.OPTForCausalLM.from_pretrained(path)
    assert math.isfinite(model(np.array([[2, 5, 6]]), labels=np.array([[2, 5, 6]])).loss.item())


def test_generation_leaves_training_possible(folder):
    """What generation returns are ordinary tensors, usable in a graph."""
    model = model_of(folder)
    ids = make_prompts(CONFIGS["pre_ln"], 1, 4)
    out = model.generate(ids, max_new_tokens=3, eos_token_id=None)
    streamed = torch.stack(list(model.stream(ids, max_new_tokens=3, eos_token_id=None)), 1)
    beams = model.generate(ids, max_new_tokens=3, eos_token_id=None, num_beams=2)
    for text in (out, streamed, beams):
        model(text, labels=text).loss.backward()


def test_dtype_auto_is_the_stored_one(folder, tmp_path):
    model_of(folder).bfloat16().save_pretrained(tmp_path)
    loaded = opt_torch.OPTForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.dtype == "bfloat16"
    named = opt_torch.OPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert named.dtype == torch.float16
    with pytest.raises(ConfigError, match="dtype: expected one of"):
        opt_torch.OPTForCausalLM.from_pretrained(tmp_path, dtype="fp16")


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "mps:0"])
def test_a_device_that_is_not_there(folder, device):
    with pytest.raises(ConfigError, match=f"device: '{device}' cannot be used here"):
        model_of(folder, device=device)


def test_compiles_without_a_graph_break(folder):
    """`torch.compile` users get one graph per shape."""
    model, ids = model_of(folder), torch.tensor(make_prompts(CONFIGS["pre_ln"], 1, 4))
    explanation = torch._dynamo.explain(lambda x: model(x).logits)(ids)
    assert explanation.graph_count == 1
    assert explanation.graph_break_count == 0


LONG = {"max_new_tokens": 40, "eos_token_id": None}


@pytest.mark.parametrize("variant", [*CONFIGS, "gelu_new"])
def test_models_can_be_copied_and_pickled(folder, variant):
    import copy
    import pickle

    config = CONFIGS.get(variant) or CONFIGS["pre_ln"].replace(activation_function=variant)
    model, ids = model_of(folder, config), make_prompts(config, 2, 5)
    twins: list[opt_torch.OPTForCausalLM] = [
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
    ]  # fmt: skip
    if variant == "pre_ln":
        half = model_of(folder, dtype="bfloat16")
        half.generate(ids, **LONG)
        assert torch.equal(copy.deepcopy(half).generate(ids, **LONG), half.generate(ids, **LONG))
    for twin in twins:
        assert torch.equal(twin(ids).logits, model(ids).logits)
        assert twin.lm_head.weight is twin.get_decoder().embed_tokens.weight


def test_a_replaced_head_is_saved(folder, tmp_path):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 2, 5)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(99, 32))
    model.save_pretrained(tmp_path)
    again = opt_torch.OPTForCausalLM.from_pretrained(tmp_path)
    assert not again.config.tie_word_embeddings
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_values_beyond_float16_are_refused(folder, tmp_path):
    model = model_of(folder)
    with torch.no_grad():
        model.get_decoder().layers[0].get_parameter("fc2.weight").mul_(1e8)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc2\.weight: values beyond the range"):
        opt_torch.OPTForCausalLM.from_pretrained(tmp_path, dtype="float16")


def test_a_cache_is_continued_once(folder):
    """Buffers are shared with the successor: a second continuation would overwrite the first."""
    model, ids = (
        model_of(folder),
        make_prompts(CONFIGS["pre_ln"], 1, 6),
    )
    first = model(ids[:, :4], past_key_values=model.init_cache(1, 10))
    model(ids[:, 4:5], past_key_values=first.past_key_values)
    with pytest.raises(InputError, match=r"continued already \(it holds 4 tokens, .* 5\)"):
        model(ids[:, 5:], past_key_values=first.past_key_values)


def test_going_back_uses_the_others_up(folder):
    """They are on the same buffers: what follows a cropped cache overwrites what they hold."""
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 1, 6)
    first = model(ids[:, :4], past_key_values=model.init_cache(1, 10)).past_key_values
    second = model(ids[:, 4:], past_key_values=first).past_key_values
    back = second.crop(2)
    for cache in (first, second):
        for call in (
            lambda cache: model(ids[:, :1], past_key_values=cache),
            lambda cache: model.generate(ids.repeat(2, 1), past_key_values=cache, max_new_tokens=1),
            lambda cache: cache.crop(1),
        ):
            with pytest.raises(InputError, match="past_key_values is used up: crop or select"):
                call(cache)
    model(ids[:, 2:], past_key_values=back)
