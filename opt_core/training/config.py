"""Settings of a training run and its learning rate, whatever framework computes it."""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np

from opt_core.config import OPTConfig
from opt_core.errors import ConfigError
from opt_core.params import HEAD_PARAMETERS, Head, ParamSpec, param_specs
from opt_core.training.lora import TARGETS, adapter_specs, check_targets

_SCHEDULES = ("cosine", "linear", "polynomial", "constant")
_PRECISIONS = ("float32", "bfloat16")
_LEAST = {
    "max_steps": 1, "batch_size": 1, "sequence_length": 2, "warmup_steps": 0, "seed": 0,
    "gradient_accumulation_steps": 1, "lora_rank": 0, "eval_every": 0, "eval_batches": 0,
    "patience": 0, "save_every": 0, "keep_checkpoints": 1, "max_skipped_steps": 0,
}  # fmt: skip
"""The integers among the settings, and the least value of each."""

_TOTAL_TOKENS, _WARMUP_TOKENS = int(300e9), int(375e6)
_MILLION = 1024 * 1024
_RECIPES: dict[str, tuple[float, float]] = {
    "opt-125m": (6e-4, 0.5), "opt-350m": (3e-4, 0.5), "opt-1.3b": (2e-4, 1),
    "opt-2.7b": (1.6e-4, 1), "opt-6.7b": (1.2e-4, 2), "opt-13b": (1e-4, 4),
    "opt-30b": (1e-4, 4), "opt-66b": (8e-5, 2), "opt-175b": (3e-5, 2),
}  # fmt: skip
"""Peak learning rate and millions of tokens per step of each size."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run with AdamW.

    Attributes:
        max_steps: Optimizer steps.
        batch_size: Rows per step.
        sequence_length: Tokens per row.
        learning_rate: Peak learning rate.
        warmup_steps: Steps over which the rate rises linearly from 0 to its peak.
        lr_schedule: How it falls afterwards: "cosine", "linear" or "polynomial", to `min_lr_ratio`
            of the peak at `max_steps`, or "constant".
        lr_power: Exponent of the polynomial.
        min_lr_ratio: Last learning rate as a share of the peak.
        adam_beta1: Decay of the gradient's running mean.
        adam_beta2: Decay of the squared gradient's running mean.
        adam_epsilon: Added to the root of the squared gradient's mean.
        weight_decay: Decoupled decay of every weight but biases and norms (`ParamSpec.decays`).
        max_grad_norm: Gradients are scaled down to this global L2 norm.
        seed: Of batches, dropout and new weights.
        gradient_accumulation_steps: Parts that the rows of a step are computed in, one after the
            other, to save memory; the step is the same. It divides `batch_size`.
        precision: What products are computed in: "float32", or "bfloat16" with float32 weights.
        gradient_checkpointing: Compute activations again when they are needed, to save memory.
        dropout: Of hidden states; by default as the model has it.
        attention_dropout: Of attention weights; by default as the model has it.
        label_smoothing: Share of the likelihood that is asked for everywhere, not at the label.
        lora_rank: Rank of low-rank adapters, which are trained in place of the model; 0: none.
        lora_alpha: The adapters' output is scaled by `lora_alpha / lora_rank`.
        lora_targets: Linear layers that get an adapter: q_proj, k_proj, v_proj, out_proj, fc1, fc2.
        freeze: Names of parameters that are not trained, such as "model.decoder.layers.0.*".
        eval_every: Steps between validations; 0: none.
        eval_batches: Batches of a validation; 0: all there are.
        patience: Validations without a better loss before training stops; 0: never.
        save_every: Steps between checkpoints; 0: at the end only.
        keep_checkpoints: Newest checkpoints to keep; the best one by validation is kept as well.
        max_skipped_steps: Steps in a row that may be skipped because their loss or gradient was
            not finite; one more ends the run.

    Raises:
        ConfigError: A value out of range, or values that contradict one another.
    """

    max_steps: int = 1000
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    lr_schedule: Literal["cosine", "linear", "polynomial", "constant"] = "cosine"
    lr_power: float = 1.0
    min_lr_ratio: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0
    gradient_accumulation_steps: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    dropout: float | None = None
    attention_dropout: float | None = None
    label_smoothing: float = 0.0
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_targets: tuple[str, ...] = TARGETS
    freeze: tuple[str, ...] = ()
    eval_every: int = 0
    eval_batches: int = 0
    patience: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    max_skipped_steps: int = 10

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ConfigError(
                    f"{name}: expected an integer >= {least}, received {getattr(self, name)!r}"
                )
        positive = ("learning_rate", "adam_epsilon", "max_grad_norm", "lr_power", "lora_alpha")
        for name in positive:
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < math.inf:
                raise ConfigError(f"{name}: expected a number > 0, received {value!r}")
        self._check_shares()
        for name, names in (("lr_schedule", _SCHEDULES), ("precision", _PRECISIONS)):
            if getattr(self, name) not in names:
                listed = f"{', '.join(names[:-1])} or {names[-1]}"
                raise ConfigError(f"{name}: expected {listed}, received {getattr(self, name)!r}")
        if type(self.gradient_checkpointing) is not bool:
            raise ConfigError(
                "gradient_checkpointing: expected True or False, "
                f"received {self.gradient_checkpointing!r}"
            )
        for name in ("lora_targets", "freeze"):
            value = getattr(self, name)
            if not _is_names(value):
                raise ConfigError(f"{name}: expected names, received {value!r}")
            object.__setattr__(self, name, tuple(value))
        if self.lora_rank:
            check_targets(self.lora_targets)
        self._check_together()

    def _check_shares(self) -> None:
        open_ones = ("adam_beta1", "adam_beta2", "label_smoothing", "dropout", "attention_dropout")
        for name in (*open_ones, "min_lr_ratio", "weight_decay"):
            value: Any = getattr(self, name)
            is_open = name in open_ones
            if value is None and name.endswith("dropout"):
                continue
            share: Any = value
            if not _is_number(share) or not 0 <= share <= 1 or (is_open and share == 1):
                bound = "<" if is_open else "<="
                raise ConfigError(f"{name}: expected 0 <= x {bound} 1, received {value!r}")

    def _check_together(self) -> None:
        if self.warmup_steps > self.max_steps:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} exceeds max_steps={self.max_steps}"
            )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} does not divide "
                f"batch_size={self.batch_size}"
            )
        if self.patience and not self.eval_every:
            raise ConfigError("patience needs validations: set eval_every")
        if self.lora_rank and self.freeze:
            raise ConfigError("freeze and lora_rank: with adapters the model is frozen already")

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """The published recipe of a size: 300 billion tokens, the first 375 million as warm-up.

        Source: metaseq's `opt_job_constants.py` and `opt_baselines.py`; opt-175b as in these files
        (the OPT paper says 1.2e-4).

        Args:
            name: "opt-125m" to "opt-175b".
            **changes: Fields to set otherwise. The number of steps and of warm-up steps follow
                from `batch_size` and `sequence_length` unless given.

        Raises:
            ConfigError: No such recipe, or a bad value.
        """
        if name not in _RECIPES:
            raise ConfigError(f"no training recipe {name!r}: expected one of {', '.join(_RECIPES)}")
        rate, millions = _RECIPES[name]
        length = changes.get("sequence_length", 2048)
        try:
            rows = changes.get("batch_size", max(1, int(millions * _MILLION) // length))
            steps, warmup = _TOTAL_TOKENS // (rows * length), _WARMUP_TOKENS // (rows * length)
            values: dict[str, Any] = {
                "learning_rate": rate, "batch_size": rows, "sequence_length": length,
                "max_steps": steps, "warmup_steps": min(warmup, changes.get("max_steps", warmup)),
                "lr_schedule": "polynomial", "min_lr_ratio": 0.1, "adam_beta2": 0.95,
                "weight_decay": 0.1, "max_grad_norm": 1.0, "dropout": 0.1,
                "attention_dropout": 0.1,
            }  # fmt: skip
        except (TypeError, ZeroDivisionError):
            raise ConfigError("batch_size and sequence_length: expected integers") from None
        return cls(**values | changes)

    def replace(self, **changes: Any) -> Self:
        """A copy with other values."""
        return replace(self, **changes)

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
        if self.lr_schedule == "cosine":
            left = (1 + math.cos(math.pi * done)) / 2
        else:
            left = (1 - done) ** (self.lr_power if self.lr_schedule == "polynomial" else 1)
        return self.learning_rate * (self.min_lr_ratio + (1 - self.min_lr_ratio) * left)

    def dropout_seed(self, step: int, part: int = 0) -> int:
        """Seed of what one part of one step drops; nothing else has to be kept to go on."""
        words = np.random.SeedSequence((self.seed, step, part)).generate_state(1, np.uint32)
        return int(words[0]) >> 1

    def model_config(self, config: OPTConfig) -> OPTConfig:
        """A model's configuration with the dropout of this training."""
        changes = {
            name: getattr(self, name)
            for name in ("dropout", "attention_dropout")
            if getattr(self, name) is not None
        }
        return config.replace(**changes)

    def trained_specs(self, config: OPTConfig, head: Head) -> list[ParamSpec]:
        """The parameters that training changes: all, or adapters and a head that is new.

        Args:
            config: The model's configuration.
            head: Its head.

        Raises:
            ConfigError: A name to freeze that no parameter has, or nothing left to train.
        """
        specs = param_specs(config, head)
        if self.lora_rank:
            new = HEAD_PARAMETERS[head] if head != "causal_lm" else ()
            adapters = adapter_specs(config, self.lora_rank, self.lora_targets)
            return [*adapters, *(spec for spec in specs if spec.name in new)]
        for pattern in self.freeze:
            if not any(fnmatch.fnmatchcase(spec.name, pattern) for spec in specs):
                raise ConfigError(f"freeze: no parameter is called {pattern!r}")
        kept = [spec for spec in specs if not _matches(spec.name, self.freeze)]
        if not kept:
            raise ConfigError("freeze: nothing is left to train")
        return kept


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(name, str) and name
        for name in value  # pyright: ignore[reportUnknownVariableType]
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
