"""Models that stay in their files: the same numbers, in the memory of a few layers."""

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import opt_torch.checkpoint
from opt_core.checkpoints import save_checkpoint
from opt_core.checkpoints.tensor_file import TensorFile
from opt_core.config import OPTConfig
from opt_core.errors import ConfigError
from opt_core.generation.mixin import make_request
from opt_core.params import param_specs
from opt_core.serving.row import Row
from opt_core.serving.scheduler import Scheduler
from opt_torch import OPTForCausalLM, OPTForSequenceClassification, OPTModel
from opt_torch.serving.engine import Engine
from tests.support.configs import CONFIGS
from tests.support.oracle import random_params
from tests.support.reference import make_prompts

LARGE = OPTConfig(
    hidden_size=512, ffn_dim=2048, num_hidden_layers=20, num_attention_heads=8, vocab_size=512,
    max_position_embeddings=64, word_embed_proj_dim=512,
)  # fmt: skip
LAYER = 12 * 512 * 512 * 4  # bytes in float32; half of them in the file
TYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def save(folder: Path, config: OPTConfig, dtype: str) -> Path:
    noise = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32) / 50
    specs = param_specs(config)
    fetch = {
        spec.name: lambda spec=spec: np.resize(noise, spec.shape).astype(TYPES[dtype])
        for spec in specs
    }
    save_checkpoint(folder, config, fetch, specs, dtype)
    return folder


def resident(kind: str) -> int:
    """Bytes of this process' memory: "RssAnon" its own, "RssFile" pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def test_rows_of_a_server_are_those_of_a_model_in_memory(tmp_path):
    save(tmp_path, CONFIGS["pre_ln"], "float16")
    found = []
    for offload in (False, True):
        model = OPTForCausalLM.from_pretrained(tmp_path, dtype="float32", offload=offload)
        scheduler = Scheduler(Engine(model, 2), 4)
        rows = [
            Row(make_request(model, input_ids=[ids], max_new_tokens=5, do_sample=False))
            for ids in ([2, 7, 9, 11, 30, 8], [2, 40], [2, 5, 6])
        ]
        for row in rows:
            scheduler.submit(row)
        while not scheduler.is_idle:
            scheduler.step()
        found.append([row.made for row in rows])
    assert found[0] == found[1]
    assert all(len(tokens) == 5 for tokens in found[0])


@pytest.mark.parametrize("variant", ["pre_ln", "post_ln"])
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [("float32", "float32"), ("float16", "float16"), ("bfloat16", "auto"), ("float16", "float32"),
     ("bfloat16", "float32")],
)  # fmt: skip
def test_logits_and_texts_are_those_of_a_model_in_memory(variant, stored, dtype, tmp_path):
    config = CONFIGS[variant]
    params = random_params(config)
    fetch = {name: lambda value=value: value for name, value in params.items()}
    save_checkpoint(tmp_path, config, fetch, param_specs(config), stored)
    ids = make_prompts(config, 3, 6)
    whole = OPTForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    model = OPTForCausalLM.from_pretrained(tmp_path, dtype=dtype, offload=True)
    assert (model.dtype, model.device) == (whole.dtype, whole.device)
    layer: Any = model.model.decoder.layers[0]
    weights = [layer.fc1.weight, model.lm_head.weight]
    assert {str(w.dtype) for w in weights} == {f"torch.{stored}"}
    with torch.no_grad():
        assert torch.equal(model(ids).logits, whole(ids).logits)
    embeds = whole.get_input_embeddings()(torch.as_tensor(ids)).detach().requires_grad_()
    gradients = []
    for each in (model, whole):
        each(inputs_embeds=embeds).logits.square().mean().backward()
        gradients.append(embeds.grad)
        embeds.grad = None
    assert torch.equal(*gradients)
    for settings in ({}, {"do_sample": True, "seed": 3}, {"num_beams": 3}):
        settings |= {"max_new_tokens": 6, "eos_token_id": None}
        assert torch.equal(model.generate(ids, **settings), whole.generate(ids, **settings))


def test_other_heads_and_an_untied_one(folder):
    ids = torch.tensor([[2, 5, 9, 7]])
    path = folder("pre_ln", "sequence_classification")
    for cls in (OPTModel, OPTForSequenceClassification):
        whole, model = (cls.from_pretrained(path, offload=offload) for offload in (False, True))
        assert torch.equal(model(ids)[0], whole(ids)[0])
    path = folder(CONFIGS["pre_ln"].replace(tie_word_embeddings=False))
    whole, model = (
        OPTForCausalLM.from_pretrained(path, offload=offload) for offload in (False, True)
    )
    assert torch.equal(model(ids).logits, whole(ids).logits)


def test_copies_and_saved_models_have_all_weights(folder, tmp_path):
    path = folder("pre_ln")
    model, ids = OPTForCausalLM.from_pretrained(path, offload=True), torch.tensor([[2, 5, 9]])
    right = model(ids).logits
    assert torch.equal(copy.deepcopy(model)(ids).logits, right)
    model.save_pretrained(tmp_path)
    assert torch.equal(OPTForCausalLM.from_pretrained(tmp_path)(ids).logits, right)
    layer: Any = model.model.decoder.layers[0]
    linear = layer.fc1
    states = torch.randn(2, 32)
    assert torch.equal(pickle.loads(pickle.dumps(linear))(states), linear(states))
    assert torch.equal(model.double()(ids).logits.float().argmax(-1), right.argmax(-1))


def test_memory_is_that_of_a_few_layers(tmp_path, monkeypatch):
    path, ids = save(tmp_path, LARGE, "float16"), torch.tensor([[2, 5, 9]])
    OPTForCausalLM.from_pretrained(path, dtype="float16")(ids)  # what a first call leaves behind
    monkeypatch.setattr(opt_torch.checkpoint, "available_memory", lambda: 0.0)
    gc.collect()
    before = {kind: resident(kind) for kind in ("RssAnon", "RssFile")}
    model = OPTForCausalLM.from_pretrained(path, offload=True)
    most = dict(before)

    def look(*_) -> None:
        for kind in most:
            most[kind] = max(most[kind], resident(kind))

    layers: Any = model.model.decoder.layers
    for layer in layers:
        layer.fc2.register_forward_hook(look)
    with torch.no_grad():
        model.generate(ids, max_new_tokens=3, eos_token_id=None)
    assert most["RssAnon"] - before["RssAnon"] < 4 * LAYER
    assert LAYER / 4 < most["RssFile"] - before["RssFile"] < 4 * LAYER / 2


def advice(model, monkeypatch) -> list[tuple[str, int]]:
    """Advice to the system from now on: "prefetch" or "drop", and the layer; -1: the head."""
    places = {}
    for number, layer in enumerate(model.model.decoder.layers):
        places[layer.fc2.weight.data_ptr()] = number
    places[model.lm_head.weight.data_ptr()] = -1
    told: list[tuple[str, int]] = []
    for name in ("prefetch", "drop"):
        real = getattr(TensorFile, name)

        def spy(file, start, stop, name=name, real=real):
            base = np.frombuffer(file._map, np.uint8).ctypes.data
            told.extend((name, n) for at, n in places.items() if start <= at - base < stop)
            real(file, start, stop)

        monkeypatch.setattr(TensorFile, name, spy)
    return told


def test_each_layer_is_asked_for_before_its_turn_and_let_go_of(folder, monkeypatch):
    path, ids = folder(CONFIGS["pre_ln"].replace(num_hidden_layers=4)), torch.tensor([[2, 5, 9]])
    monkeypatch.setattr(opt_torch.checkpoint, "available_memory", lambda: 0.0)
    model = OPTForCausalLM.from_pretrained(path, offload=True)
    told = advice(model, monkeypatch)
    model(ids)
    model(ids)
    for name in ("prefetch", "drop"):
        asked = [number for what, number in told if what == name]
        assert asked[:10] == [0, 1, 2, 3, -1] * 2
        assert asked[10:] in ([], [0])  # the next step's, which another thread asks for
    asked, dropped = (
        [i for i, (what, _) in enumerate(told) if what == name] for name in ("prefetch", "drop")
    )
    # A layer is there before it is computed; the one after the next is asked for when it is done.
    assert all(ask < drop for ask, drop in zip(asked, dropped, strict=False))
    assert all(ask > drop for ask, drop in zip(asked[2:], dropped, strict=False))


def test_what_fits_into_memory_stays_there(folder, monkeypatch):
    path, ids = folder(CONFIGS["pre_ln"].replace(num_hidden_layers=4)), torch.tensor([[2, 5, 9]])
    monkeypatch.setattr(opt_torch.checkpoint, "available_memory", lambda: 1e9)
    model = OPTForCausalLM.from_pretrained(path, offload=True)
    told = advice(model, monkeypatch)
    model(ids)
    assert {what for what, _ in told} == {"prefetch"}


def test_a_model_that_does_not_fit_stays_in_its_file(folder, monkeypatch):
    path = folder("pre_ln")
    size = 4 * sum(spec.size for spec in param_specs(CONFIGS["pre_ln"]))
    for available, stays in ((size, True), (1.2 * size, False)):
        monkeypatch.setattr(opt_torch.checkpoint, "available_memory", lambda n=available: n)
        if stays:
            with pytest.warns(UserWarning, match="offload: .* do not fit into .* of free memory"):
                model = OPTForCausalLM.from_pretrained(path, offload="auto")
        else:
            model = OPTForCausalLM.from_pretrained(path, offload="auto")
        assert model.lm_head.weight.requires_grad != stays
    monkeypatch.setattr(opt_torch.checkpoint, "available_memory", lambda: 0.0)
    assert OPTForCausalLM.from_pretrained(path).lm_head.weight.requires_grad
    unfit: list[dict[str, Any]] = [{"quantize": "int8"}, {"dtype": "bfloat16"}]  # cannot stay
    for options in unfit:
        OPTForCausalLM.from_pretrained(path, offload="auto", **options)


def test_what_an_offloaded_model_cannot_do_is_refused(folder, tmp_path):
    path = folder("pre_ln")
    refused: list[tuple[dict[str, Any], str]] = [
        ({"offload": "disk"}, "offload: expected True, False or 'auto', received 'disk'"),
        ({"offload": True, "quantize": "int4"}, "offload: expected quantize=None"),
        ({"offload": True, "device": "meta"}, "expected device='cpu', received 'meta'"),
        ({"offload": True, "dtype": "float16"}, "expected dtype 'float32' or 'float64' for float"),
    ]
    for options, message in refused:
        with pytest.raises(ConfigError, match=message):
            OPTForCausalLM.from_pretrained(path, **options)
    held = OPTForCausalLM.from_pretrained(path).state_dict()
    with pytest.raises(ConfigError, match=r"embed_tokens.weight is not in the file as .* convert"):
        OPTForCausalLM.from_pretrained(path, state_dict=held, offload=True)
    model = OPTForCausalLM.from_pretrained(path, device_map={"": "disk"}, offload_folder=tmp_path)
    assert vars(model)["hf_device_map"] == {"": "disk"}
    with pytest.raises(ConfigError, match="train: an offloaded model can only be run"):
        model.train()
