"""What a training run is made of, whatever framework computes it: settings and learning rate."""

import math
from dataclasses import dataclass
from typing import Literal

from opt_core.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run with AdamW.

    Attributes:
        max_steps: Optimizer steps.
        batch_size: Rows per step.
        sequence_length: Tokens per row.
        learning_rate: Peak learning rate.
        warmup_steps: Steps over which the rate rises linearly from 0 to its peak.
        lr_schedule: How it falls afterwards: "cosine" or "linear", to `min_lr_ratio` of the peak at
            `max_steps`, or "constant".
        min_lr_ratio: Last learning rate as a share of the peak.
        adam_beta1: Decay of the gradient's running mean.
        adam_beta2: Decay of the squared gradient's running mean.
        adam_epsilon: Added to the root of the squared gradient's mean.
        weight_decay: Decoupled decay of every weight that `ParamSpec.decays`.
        max_grad_norm: Gradients are scaled down to this global L2 norm.
        seed: Of batches and dropout.

    Raises:
        ConfigError: A value out of range.
    """

    max_steps: int = 1000
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("max_steps", 1),
            ("batch_size", 1),
            ("sequence_length", 2),
            ("warmup_steps", 0),
        ):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ConfigError(
                    f"{name}: expected an integer >= {least}, received {getattr(self, name)!r}"
                )
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(f"{name}: expected a number > 0, received {value!r}")
        for name in ("adam_beta1", "adam_beta2", "min_lr_ratio", "weight_decay"):
            value, is_open = getattr(self, name), name.startswith("adam")
            is_number = isinstance(value, int | float)
            if not is_number or not 0 <= value <= 1 or (is_open and value == 1):
                bound = "<" if is_open else "<="
                raise ConfigError(f"{name}: expected 0 <= x {bound} 1, received {value!r}")
        if self.lr_schedule not in ("cosine", "linear", "constant"):
            raise ConfigError(
                f"lr_schedule: expected cosine, linear or constant, received {self.lr_schedule!r}"
            )
        if self.warmup_steps > self.max_steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} exceeds max_steps={self.max_steps}"
            )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of one step.

        Args:
            step: Step number, from 0; the first step of a warm-up already moves.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.lr_schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(self.max_steps - self.warmup_steps, 1)
        left = 1 - done if self.lr_schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * (self.min_lr_ratio + (1 - self.min_lr_ratio) * left)
