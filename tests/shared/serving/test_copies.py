"""Programs of serving, compiled by XLA: none copies the key-value cache, or gives it back anew."""

import importlib
import math
import re
from typing import Any

import numpy as np
import pytest

from opt_core.serving.engine import Table
from tests.support.backends import BACKENDS
from tests.support.configs import CONFIGS

CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
SLOTS, CHUNK = 3, 8


def make_engine(backend, folder) -> Any:
    module = importlib.import_module(f"opt_{backend.name}.serving.engine")
    return module, module.Engine(backend.load(folder(CONFIG)), SLOTS)


def programs(backend, module, engine) -> dict[str, str]:
    """The programs that XLA makes of a step, of reading a prompt, and of copying a row."""
    buffers, number = (engine.keys, engine.values), np.int32(1)
    rows, some = np.ones(SLOTS, np.int32), np.arange(CHUNK, dtype=np.int32)
    inputs: dict[str, tuple[Any, ...]] = {
        "_step": (*buffers, rows, rows),
        "_read": (*buffers, number, number, number, some, some),
        "_copy": (buffers, number, number),
    }
    if backend.name == "flax":
        inputs |= {k: (engine.graph, engine.state, *inputs[k]) for k in ("_step", "_read")}
        return {k: getattr(module, k).lower(*x).compile().as_text() for k, x in inputs.items()}
    make = importlib.import_module("opt_tf.compilation").compiled
    made = {key: make(engine.model, getattr(module, key), engine.width) for key in inputs}
    return {
        key: made[key].experimental_get_compiler_ir(*values)(stage="optimized_hlo")
        for key, values in inputs.items()
    }


@pytest.mark.xla
@pytest.mark.parametrize("backend", [n for n in BACKENDS if n != "torch"], indirect=True)
def test_no_program_copies_the_cache(backend, folder):
    module, engine = make_engine(backend, folder)
    size = SLOTS * engine.width * CONFIG.hidden_size
    for key, text in programs(backend, module, engine).items():
        copies = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", text)
        assert size not in [math.prod(map(int, shape.split(","))) for shape in copies], key
        aliases = re.search(r"input_output_alias=\{(.*?) \}", text)
        assert aliases, key
        assert aliases[1].count("-alias") == len((*engine.keys, *engine.values)), key


@pytest.mark.parametrize("backend", [n for n in BACKENDS if n == "tf"], indirect=True)
def test_variables_stay(backend, folder):
    """Programs write to them, at any width; what a program is traced with, it would hold on to."""
    _, engine = make_engine(backend, folder)
    variables = [*engine.keys, *engine.values]
    table = Table(SLOTS, CONFIG.max_position_embeddings)
    table.counts[:] = 1
    for width in (128, 256, 128):
        engine.resize(width)
        engine.step(table)
        engine.read(table, 0, 0, 1, CHUNK, False)
        engine.copy(0, 1, 1)
        for old, new in zip(variables, (*engine.keys, *engine.values), strict=True):
            assert new is old
            assert new.numpy().shape[2] == width
            assert (new.numpy()[1, :, 0] != 0).any()
