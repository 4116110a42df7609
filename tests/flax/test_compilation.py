"""Compiled functions: what is compiled how often."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
from jax import monitoring

from opt_core.training.config import TrainConfig
from opt_flax import compilation, programs, training
from opt_flax.generation import beam, loop, speculative
from opt_flax.programs import SMALL, Program
from tests.support.configs import CONFIGS
from tests.support.flax_models import MODEL, logits_of, model_of
from tests.support.reference import make_mask, make_prompts

STEP: Any = training._step
CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1, vocab_size=97)
"""No other module's, so that none of its programs is there already."""


def compiled():
    """Programs compiled so far for generation."""
    return {
        f"{module.__name__}.{name}": getattr(module, name)._cache_size()
        for module, names in (
            (compilation, ("_read_prompts",)),
            (loop, ("_open", "_step", "_loop")),
            (beam, ("_open", "_loop")),
        )
        for name in names
    }


SAMPLED = {"do_sample": True, "eos_token_id": None, "repetition_penalty": 1.3}


@pytest.mark.parametrize("padded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_program_per_bucket(folder, padded):
    """Whatever the length within it, the padding, the seed and the settings that are numbers."""
    model = model_of(folder, CONFIG)

    def run(length, seed, **settings):
        ids = make_prompts(CONFIG, 2, length, seed=seed)
        mask = make_mask("left", [length, length - seed % 3 - 1]) if padded else None
        list(model.stream(ids, mask, seed=seed, **SAMPLED, **settings))
        model.generate(ids, mask, seed=seed, **SAMPLED, **settings)
        model.generate(ids, mask, num_beams=2, max_new_tokens=settings["max_new_tokens"])

    none = compiled()
    run(5, 1, temperature=0.5, max_new_tokens=6, min_new_tokens=2)
    before = compiled()
    assert all(before[name] > count for name, count in none.items())
    run(9, 2, temperature=1.5, max_new_tokens=11, min_new_tokens=3)
    run(20, 2**40, temperature=1.0001, max_new_tokens=2, min_new_tokens=1)
    assert compiled() == before


def test_drafts_need_no_other_program(folder):
    """Another prompt, seed, temperature, or number of drafted tokens that are right."""
    model = model_of(folder, CONFIG)

    def run(ids, seed, temperature):
        settings = {**SAMPLED, "seed": seed, "temperature": temperature, "max_new_tokens": 12}
        model.generate(ids, prompt_lookup_num_tokens=3, **settings)
        model.generate(ids, assistant_model=model, num_assistant_tokens=2, **settings)

    def counts():
        names = ("_open", "_check", "_propose")
        return {name: getattr(speculative, name)._cache_size() for name in names}

    before = counts()
    run([[2, 5, 6, 5, 6]], 1, 0.5)
    # The first token; the blocks of lookup, found or not, and of the draft.
    most = {"_open": 1, "_check": 3, "_propose": 1}
    run([[2, 50, 51, 52, 53, 54]], 2, 5.0)
    after = counts()
    assert {name: after[name] - before[name] for name in after} == most
    run([[2, 7, 8, 9, 7, 8, 9, 7]], 2**40, 1.5)
    run([[2, 5, 6, 5]], 4, 0.1)
    assert counts() == after


@pytest.mark.slow  # the same of a mesh: tests/flax/test_sharding.py
def test_a_training_step_updates_in_place(folder):
    """The compiled step takes the model's arrays over and puts new ones in their places."""
    model, ids = model_of(folder, CONFIG), make_prompts(CONFIG, 2, 9)
    train = TrainConfig(max_steps=3, learning_rate=1e-2)
    optimizer = training.make_optimizer(model, train)
    model.train()
    compiled = STEP._cache_size()
    losses = [training.train_step(model, optimizer, ids, train, step)[0] for step in range(3)]
    assert losses[2] < losses[0]
    assert STEP._cache_size() == compiled + 1
    model.eval()
    assert np.isfinite(logits_of(model, ids)).all()


def test_options_of_another_version_are_left_out(monkeypatch):
    """XLA drops options from one version to the next: `xla_cpu_use_fusion_emitters` was one."""
    known = programs.known_options.__wrapped__()
    assert {"xla_backend_optimization_level", "xla_llvm_disable_expensive_passes"} <= known.keys()
    monkeypatch.setattr(programs, "QUICKLY", {"xla_of_another_version": True, **known})
    assert programs.known_options.__wrapped__() == known


def test_loading_compiles_no_program_for_each_shape(folder):
    """`jnp.asarray` has XLA copy each: a fifth of a second before the first text."""
    model_of(folder, CONFIG)  # and what every model needs
    config = CONFIG.replace(vocab_size=89, ffn_dim=40, max_position_embeddings=31)
    path, compiled = folder(config), list[str]()

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(f"{duration_secs} {kwargs}")

    monitoring.register_event_duration_secs_listener(listen)
    try:
        MODEL.from_pretrained(path)
    finally:
        monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


def test_little_is_compiled_quickly():
    """Alone on a CPU; what is part of another program is compiled as that is."""
    program = Program(lambda x: 2 * x + 1)
    for count in (8, SMALL, SMALL + 1):
        np.testing.assert_array_equal(program(np.ones(count, np.float32)), np.full(count, 3))
    assert (program._quickly._cache_size(), program._well._cache_size()) == (2, 1)
    assert program._cache_size() == 3
    np.testing.assert_array_equal(jax.jit(program)(np.ones(2, np.float32)), [3, 3])
    assert program._quickly._cache_size() == 2
