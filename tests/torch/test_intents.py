"""Intents of the tests of `transformers`' OPT in PyTorch, in words of our own."""

import copy
import io
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import nn

import opt_torch
from opt_core import OPTConfig
from opt_core.errors import ConfigError, UnsupportedError
from opt_torch import OPTForCausalLM, OPTForSequenceClassification, OPTModel
from opt_torch.modeling import OPTPreTrainedModel
from tests.support.configs import CONFIGS

transformers = pytest.importorskip("transformers")
BaseStreamer: Any = transformers.generation.streamers.BaseStreamer
CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=2, dropout=0.0)
IDS = torch.tensor(np.random.default_rng(0).integers(4, 99, (2, 7)))
MASK = torch.ones_like(IDS)
SETTINGS = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> OPTForCausalLM:
    return OPTForCausalLM(CONFIG)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def as_transformers(model: Any) -> Any:
    config = transformers.OPTConfig(**model.config.to_dict())
    theirs = getattr(transformers, type(model).__name__)(config).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


@pytest.mark.parametrize(
    "name",
    ["OPTModel", "OPTForCausalLM", "OPTForSequenceClassification", "OPTForQuestionAnswering"],
)
def test_tuples_have_transformers_order(name):
    model = getattr(opt_torch, name)(CONFIG)
    theirs = as_transformers(model)
    options = {"output_hidden_states": True, "output_attentions": True, "use_cache": True}
    names = {"cache": "past_key_values"}  # transformers 5.24 calls it so
    with torch.no_grad():
        expected = [names.get(key, key) for key in theirs(IDS, **options)]
        found = list(model(IDS, **options))
    assert [key for key in found if key in expected] == expected
    assert set(found) - {*expected} <= {"past_key_values"}


def test_the_loss_may_be_ones_own(model):
    out = model(IDS, labels=IDS)
    close(model.loss_function(out.logits, IDS, vocab_size=99), out.loss)
    mine = copy.deepcopy(model)
    mine.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() * 0 + vocab_size
    assert mine(IDS, labels=IDS).loss == 99
    mine.loss_function = None
    close(mine(IDS, labels=IDS).loss, out.loss)


def test_layers_of_ones_own_begin_as_transformers_layers_do():
    class Scored(OPTModel):
        def __init__(self, config: Any, **options: Any) -> None:
            super().__init__(config, **options)
            self.scores = nn.Linear(config.hidden_size, 500)
            self.post_init()

    made, plain = Scored(CONFIG), OPTModel(CONFIG)
    assert 0.9 < made.scores.weight.std() / CONFIG.init_std < 1.1
    assert not made.scores.bias.any()
    assert all(torch.equal(made.state_dict()[k], v) for k, v in plain.state_dict().items())

    class Bare(OPTPreTrainedModel):
        pass

    with pytest.raises(UnsupportedError, match="Bare: a class of your own extends OPTModel"):
        Bare(CONFIG)


def test_weights_are_drawn_anew():
    model: Any = OPTForCausalLM(CONFIG)
    old = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    model.init_weights()
    table = model.get_input_embeddings().weight
    assert not torch.equal(table, old["lm_head.weight"])
    assert not table[CONFIG.pad_token_id or 0].any()
    assert model.get_output_embeddings().weight is table
    assert 0.8 < model.model.decoder.layers[0].fc1.weight.std() / CONFIG.init_std < 1.2


def test_models_may_begin_without_weights_or_in_another_type():
    with torch.device("meta"):
        assert OPTForCausalLM(CONFIG).device.type == "meta"
    torch.set_default_dtype(torch.float64)
    try:
        assert OPTForCausalLM(CONFIG).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    halved = OPTConfig(**CONFIG.replace(dtype="float16").to_dict())
    model = OPTForCausalLM._from_config(halved)
    assert model.dtype == model.config.dtype == model.config.torch_dtype == torch.float16


def test_accelerate_keeps_weights_elsewhere(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    expected = model(IDS).logits
    offloaded = copy.deepcopy(model)
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    assert offloaded.device.type == "cpu"
    close(offloaded(IDS).logits, expected)
    model.save_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        empty = OPTForCausalLM(CONFIG)
    empty.tie_weights()
    loaded = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path), device_map={"": "cpu"})
    close(loaded(IDS).logits, expected)
    placed: Any = OPTForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert placed.hf_device_map.keys() == {""}


def test_shards_and_variants_of_pickled_files(model, tmp_path):
    options: dict[str, Any] = {"safe_serialization": False, "max_shard_size": "20kB"}
    for folder, variant in ((tmp_path / "a", None), (tmp_path / "b", "v2")):
        model.save_pretrained(folder, variant=variant, **options)
        index = f"pytorch_model.bin.index{'.v2' if variant else ''}.json"
        assert (folder / index).exists()
        assert not list(folder.glob("*.safetensors"))
        loaded = OPTForCausalLM.from_pretrained(folder, variant=variant)
        close(loaded(IDS).logits, model(IDS).logits)
    theirs = transformers.OPTForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    close(theirs.eval()(IDS).logits, model(IDS).logits)


def test_caches_of_transformers_are_prefixes(model):
    expected = model.generate(IDS, **SETTINGS)
    full, empty = transformers.DynamicCache(), transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :5], past_key_values=full)
    static = transformers.StaticCache(as_transformers(model).config, max_cache_len=16)
    for past in (full, empty, static):
        assert torch.equal(model.generate(IDS, past_key_values=past, **SETTINGS), expected)
    assert full.get_seq_length() == 5


def test_settings_objects_of_transformers(model):
    given = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, repetition_penalty=1.3)
    expected = as_transformers(model).generate(IDS, generation_config=given)
    assert torch.equal(model.generate(IDS, generation_config=given), expected)
    mine = copy.deepcopy(model)
    mine.generation_config = given
    assert torch.equal(mine.generate(IDS), expected)


def test_a_loop_of_ones_own(model):
    expected, kwargs = model.generate(IDS, eos_token_id=None, **SETTINGS), {"attention_mask": MASK}
    ids = IDS
    for _ in range(4):
        inputs = model.prepare_inputs_for_generation(ids, **kwargs, is_first_iteration=True)
        assert inputs["position_ids"].shape == inputs["input_ids"].shape
        with torch.no_grad():
            out = model(**inputs)
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
        kwargs = model._update_model_kwargs_for_generation(out, kwargs)
    assert torch.equal(ids, expected)


def test_a_compiled_function_may_generate(model):
    expected = model.generate(IDS, **SETTINGS)
    found = torch.compile(model.generate, backend="eager")(IDS, **SETTINGS)
    assert torch.equal(found, expected)
    added = torch.compile(lambda ids: model.generate(ids, **SETTINGS) + 1, backend="eager")(IDS)
    assert torch.equal(added, expected + 1)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*deprecated")
def test_traces_and_graphs_take_an_empty_past(model):
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(ids, attention_mask=mask, past_key_values=None, return_dict=False)[0]

    expected = model(IDS).logits
    traced = torch.jit.trace(Logits(), (IDS, MASK))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    close(torch.jit.load(buffer)(IDS, MASK), expected)
    graph = torch.compile(model, fullgraph=True, backend="eager")
    close(graph(IDS, past_key_values=None, attention_mask=MASK).logits, expected)


def test_masks_as_transformers_spreads_them(model):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    spread = model.invert_attention_mask(mask)
    assert spread.shape == (2, 1, 1, 3)
    assert torch.equal(spread[:, 0, 0] == 0, mask.bool())
    assert model.get_head_mask(None, 2) == [None, None]
    assert model.get_head_mask(torch.ones(4), 2).shape == (2, 1, 4, 1, 1)
    with pytest.warns(UserWarning, match="begin or end in padding"):
        model.warn_if_padding_and_no_attention_mask(torch.tensor([[5, 1]]), None)


def test_adapters_of_peft_ask_for_gradients_of_inputs():
    model = OPTForCausalLM(CONFIG)
    model._hf_peft_config_loaded = True
    model.gradient_checkpointing_enable()
    model.requires_grad_(False)
    assert model.get_input_embeddings()(IDS).requires_grad
    model.gradient_checkpointing_disable()
    assert not model.get_input_embeddings()(IDS).requires_grad


@pytest.mark.parametrize("kind", ["text-generation", "text-classification"])
def test_pipelines_take_the_models(kind, tmp_path):
    from tests.support.files.tiny_folder import save_model

    home = save_model(tmp_path / "m", num_hidden_layers=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    cls = OPTForCausalLM if kind == "text-generation" else OPTForSequenceClassification
    pipe = transformers.pipeline(kind, model=cls.from_pretrained(home), tokenizer=tokenizer)
    if kind == "text-generation":
        assert pipe("Hello", max_new_tokens=3)[0]["generated_text"].startswith("Hello")
    else:
        assert {found["label"] for found in pipe("Hello", top_k=None)} == {"LABEL_0", "LABEL_1"}


def test_programs_that_go_through_the_layers_one_by_one(model):
    """As GPTQ, SparseGPT and Wanda do: catch the first layer's input, then call each layer."""

    class Caught(Exception):
        pass

    class Catcher(nn.Module):
        def __init__(self, inner: Any):
            super().__init__()
            self.inner = inner

        def forward(self, inputs: Any, **options: Any) -> None:
            caught.update(inputs=inputs, mask=options["attention_mask"])
            raise Caught

    mine: Any = copy.deepcopy(model)
    mask = MASK.clone()
    mask[0, :2] = 0
    for given in (None, mask):
        caught: dict[str, Any] = {}
        layers = mine.model.decoder.layers
        layers[0] = Catcher(layers[0])
        with pytest.raises(Caught):
            mine(IDS, attention_mask=given)
        layers[0] = layers[0].inner
        states = caught["inputs"]
        for layer in layers:
            states = layer(states, attention_mask=caught["mask"])[0]
        found = mine.lm_head(mine.model.decoder.final_layer_norm(states))
        close(found, model(IDS, attention_mask=given).logits)


def test_layers_may_be_taken_out(tmp_path):
    model = OPTForCausalLM(CONFIG).eval()
    model.model.decoder.layers = model.model.decoder.layers[1:]
    model.config.num_hidden_layers = 1
    close(model(IDS).logits, as_transformers(model)(IDS).logits)
    found = model.generate(IDS, **SETTINGS)
    assert torch.equal(found, as_transformers(model).generate(IDS, **SETTINGS))
    model.save_pretrained(tmp_path)
    close(OPTForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)
    model.config.num_hidden_layers = 2
    with pytest.raises(ConfigError, match="num_hidden_layers=2 was set on a model made with 1"):
        model(IDS)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_row_by_torch_func(model):
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: Any, row: torch.Tensor) -> torch.Tensor:
        inputs = {"labels": row[None], "use_cache": False}
        return torch.func.functional_call(model, parameters, (row[None],), inputs).loss

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, IDS)
    for i, row in enumerate(IDS):
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        for name, parameter in model.named_parameters():
            close(found[name][i], parameter.grad)


def test_streamers_are_given_tensors(model):
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.values: list[Any] = []

        def put(self, value: Any) -> None:
            self.values.append(value)

        def end(self) -> None:
            self.values.append(None)

    kept = Kept()
    found = model.generate(IDS[:1], streamer=kept, **SETTINGS)
    prompt, *tokens, end = kept.values
    assert end is None
    assert all(value.dtype == torch.long for value in (prompt, *tokens))
    assert torch.equal(torch.cat([prompt[0], *tokens]), found[0])
