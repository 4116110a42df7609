"""Training without a framework: its settings, the loop and its folder, adapters."""

from opt_core.training.config import TrainConfig

__all__ = ["TrainConfig"]
