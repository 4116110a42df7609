"""Whole programs as users write them for `transformers`, with the import changed."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from opt_torch import OPTForCausalLM
from tests.support.files.tiny_folder import save_model

transformers = pytest.importorskip("transformers")
SENTENCES = [
    "I like you.",
    "The quick brown fox jumps over the lazy dog.",
    "Hello world, the dog sleeps.",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without dropout and its tokenizer."""
    folder = tmp_path_factory.mktemp("user") / "opt"
    return str(save_model(folder, dropout=0.0, num_hidden_layers=1))


def fine_tune(cls: Any, home: str, target: str) -> tuple[list[float], Any]:
    """Fine-tunes on a few sentences; returns the losses and a text it goes on with."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>"]})
    model = cls.from_pretrained(home)
    model.config.use_cache = False
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    model.get_input_embeddings().weight.data[len(tokenizer) - 1] = 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    batch = tokenizer([f"<user>{s}" for s in SENTENCES], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    model.train()
    for _ in range(3):
        outputs = model(**batch, labels=labels)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs[0].item())
    model.eval()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    model = cls.from_pretrained(target)
    prompt = tokenizer("I like", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    return losses, tokenizer.decode(ids[0], skip_special_tokens=True)


def test_a_loop_with_new_tokens_is_that_of_transformers(home, tmp_path):
    ours, text = fine_tune(OPTForCausalLM, home, str(tmp_path / "ours"))
    theirs, expected = fine_tune(transformers.OPTForCausalLM, home, str(tmp_path / "theirs"))
    assert ours[0] > ours[-1] + 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert text == expected


def adapt(cls: Any, home: str, target: str) -> tuple[list[float], Any, Any]:
    """Trains adapters with PEFT; returns the losses, logits, and those of the merged model."""
    peft = pytest.importorskip("peft")
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    torch.manual_seed(0)
    base = cls.from_pretrained(home)
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    config = peft.LoraConfig(
        r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    trained, total = model.get_nb_trainable_parameters()
    assert 0 < trained < total
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    is_text = batch["attention_mask"].bool()
    labels = batch["input_ids"].masked_fill(~is_text, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    model.train()
    for _ in range(3):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(target)
    assert peft.PeftConfig.from_pretrained(target).base_model_name_or_path == home
    model = peft.PeftModel.from_pretrained(cls.from_pretrained(home), target).eval()
    with torch.no_grad():
        logits = model(**batch).logits[is_text]
        prompt = tokenizer(SENTENCES[0], return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=2, do_sample=False)
        assert ids.shape[1] == prompt["input_ids"].shape[1] + 2
        merged = model.merge_and_unload()
        assert type(merged) is cls
        return losses, logits, merged(**batch).logits[is_text]


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6")
def test_adapters_of_peft_are_trained_as_on_transformers(home, tmp_path):
    ours = adapt(OPTForCausalLM, home, str(tmp_path / "ours"))
    theirs = adapt(transformers.OPTForCausalLM, home, str(tmp_path / "theirs"))
    assert ours[0][0] > ours[0][-1]
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_probe_reads_and_edits_the_model(home):
    """Hooks, hidden states and embeddings, as in notebooks on what a model knows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    model = OPTForCausalLM.from_pretrained(home, attn_implementation="eager")
    assert model.num_parameters(exclude_embeddings=True) < model.num_parameters()
    seen: list[Any] = []
    layer = model.base_model.decoder.layers[0]
    hook = layer.fc2.register_forward_hook(lambda module, args, out: seen.append(out))
    inputs = tokenizer("I like you.", return_tensors="pt").to(model.device)
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        again = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    hook.remove()
    T = inputs["input_ids"].shape[1]
    assert len(seen) == 2
    assert [tuple(x.shape) for x in outputs.hidden_states] == [(1, T, 32)] * 2
    assert outputs.attentions[0].shape == (1, 4, T, T)
    torch.testing.assert_close(again.logits, outputs.logits)
    with torch.no_grad():  # an ablation
        layer.self_attn.out_proj.weight.zero_()
        assert (model(**inputs)["logits"] - outputs["logits"]).abs().max() > 0.01


def prune(model: Any, ids: Any) -> Any:
    """As Wanda does: the norms of a layer's inputs, by hooks, say which weights matter least."""
    norms: dict[Any, Any] = {}
    found = [module for module in model.modules() if type(module) is torch.nn.Linear]
    hooks = [
        module.register_forward_hook(
            lambda module, inputs, _: norms.update({module: inputs[0].flatten(0, -2).norm(dim=0)})
        )
        for module in found
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    for module in found:
        scores = module.weight.data.abs() * norms[module]
        module.weight.data[scores < scores.median()] = 0
    return model


def quantize(model: Any, ids: Any) -> Any:
    """As PyTorch's own quantisation does, which looks its layers up by their very type."""
    quantize_dynamic: Any = torch.ao.quantization.quantize_dynamic
    return quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.parametrize("program", [prune, quantize])
def test_linear_layers_are_found_by_their_type(home, program):
    ids, found = torch.arange(4, 16)[None], []
    before = OPTForCausalLM.from_pretrained(home)(ids).logits
    for cls in (OPTForCausalLM, transformers.OPTForCausalLM):
        model = program(cls.from_pretrained(home), ids)
        with torch.no_grad():
            tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
            found.append((model(ids).logits, tokens))
    (ours, our_tokens), (theirs, their_tokens) = found
    assert (ours - before).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert torch.equal(our_tokens, their_tokens)
