"""Rules of generation, as a backend's programs are given them."""

import numpy as np

from opt_core.generation.config import GenerationConfig
from opt_core.generation.request import Request
from opt_core.generation.rules import Rules, make_rules
from tests.support.backends import Backend


def backend_rules(backend: Backend, vocab_size: int, **settings) -> Rules:
    """The rules of settings, for one prompt of ids 5 and 4 new tokens."""
    config = GenerationConfig(**settings)
    request = Request(np.full((1, 2), 5, np.int32), None, config, 4, vocab_size, vocab_size, 1)
    structure, numbers = make_rules(request, is_compiled=backend.name != "torch")
    arrays = {k: backend.array(v) if v.ndim else v.item() for k, v in numbers.items()}
    return Rules(structure, arrays)
