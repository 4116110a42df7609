"""The framework-neutral half of the project: no torch, tensorflow or jax is imported here, ever.

Shapes are written as letters, in names (`q_BHTK`) and docstrings alike:

    B batch          T new tokens     S cache slots        N layers
    D hidden_size    H heads          K head size          F ffn_dim
    P embedding      V vocabulary     I inputs of a linear layer, O outputs
    W beams          R rows: batch times the sequences, beams or drafts of each prompt
    G draft tokens   C candidates     X any number
"""

from opt_core.config import OPTConfig
from opt_core.generation import GenerationConfig
from opt_core.text import OPTTokenizer
from opt_core.training import TrainConfig
from opt_core.version import __version__

__all__ = ["GenerationConfig", "OPTConfig", "OPTTokenizer", "TrainConfig", "__version__"]
