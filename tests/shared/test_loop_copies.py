"""The loop that decodes, compiled by XLA: no step may copy the key-value cache."""

import math
import re
from typing import Any

import numpy as np
import pytest

from opt_core.generation.mixin import make_request
from tests.support.backends import BACKENDS, make_backend

SETTINGS = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


def loop_of_flax(model, ids) -> Any:
    from opt_flax.generation import loop

    request = make_request(model, ids, **SETTINGS)
    return loop._loop.lower(*loop._start(model, request)).compile().as_text()


def loop_of_tf(model, ids) -> Any:
    from opt_tf.compilation import generation_program
    from opt_tf.generation import loop

    request = make_request(model, ids, **SETTINGS)
    inputs, state = loop._start(model, request)
    program = generation_program(model, request, loop._loop)
    return program.experimental_get_compiler_ir(inputs, state)(stage="optimized_hlo")


LOOPS = {"tf": loop_of_tf, "flax": loop_of_flax}


@pytest.mark.xla
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name in LOOPS])
def test_no_step_copies_the_cache(folder, name, rows):
    model = make_backend(name).load(folder("pre_ln"))
    config, slots = model.config, 64
    text = LOOPS[name](model, np.full((rows, 5), 7))
    (body,) = re.findall(r"while\(.*body=%?([\w.\-]+)", text)
    (lines,) = re.findall(rf"^%?{re.escape(body)} .*?^}}", text, re.MULTILINE | re.DOTALL)
    assert " dot(" in lines
    buffer = rows * slots * config.hidden_size
    # What XLA fuses is named after what is in it.
    sizes = [
        math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"%[\w.\-]*copy[\w.\-]* = f32\[([\d,]+)\]", lines)
    ]
    assert sizes.count(buffer) == 0
