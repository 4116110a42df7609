"""A complete model folder of some kilobytes, tokenizer included, for tests that need a path."""

from pathlib import Path
from typing import Any

from opt_core import GenerationConfig, OPTTokenizer
from opt_core.checkpoints.save import save_checkpoint
from opt_core.initialization import initial_value
from opt_core.params import param_specs
from tests.support.configs import CONFIGS
from tests.support.small_tokenizer import write_opt_folder

PADDING_ROWS = 3
"""Rows of the embedding that no token has, as in the real models."""


def save_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Saves a random model with a small tokenizer; fields of its config may be changed."""
    ids = OPTTokenizer.from_pretrained(write_opt_folder(folder)).id_limit
    fields = {"vocab_size": ids + PADDING_ROWS, "init_std": 0.3, **changes}
    config = CONFIGS["pre_ln"].replace(**fields)
    specs = param_specs(config)
    values = {s.name: lambda spec=s: initial_value(spec, config, seed) for s in specs}
    save_checkpoint(folder, config, values, specs, "float32")
    GenerationConfig.from_model(config).save_pretrained(folder)
    return folder
