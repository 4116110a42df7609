"""Adapters of the frameworks: NumPy in and NumPy out, one test body for all.

Models come from disk through `from_pretrained`: the adapters know nothing of a model's inside.
What differs between frameworks is in `backend_torch.py` and its siblings.
"""

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from opt_core.outputs import ModelOutput
from opt_core.params import Head, param_specs
from opt_core.training.config import TrainConfig
from tests.support.oracle import Array

BACKENDS = tuple(os.environ.get("OPT_BACKENDS", "torch,tf,flax").split(","))
"""Every framework; OPT_BACKENDS=flax, or tf,flax, runs the tests on these alone."""

CLASSES: dict[Head, str] = {
    "none": "OPTModel",
    "causal_lm": "OPTForCausalLM",
    "sequence_classification": "OPTForSequenceClassification",
    "question_answering": "OPTForQuestionAnswering",
}
PREFIXES = {"torch": "", "tf": "TF", "flax": "Flax"}

ORACLE_TOLERANCE = 2e-5
"""|logits - float64 oracle|, float32 on the CPU: what the project promises."""
GRADIENT_TOLERANCE = 1e-5
"""Of gradients, relative to the largest entry of each tensor."""


@dataclass(frozen=True)
class Backend:
    """One framework."""

    name: str

    def model_class(self, head: Head) -> Any:
        """The class with a head."""
        return getattr(
            importlib.import_module(f"opt_{self.name}"), PREFIXES[self.name] + CLASSES[head]
        )

    def load(self, path: Path, head: Head = "causal_lm", **options: Any) -> Any:
        """A model in evaluation mode."""
        return self.model_class(head).from_pretrained(path, **options)

    def numpy(self, value: Any) -> Any:
        """Arrays for tensors, in any nesting."""
        if isinstance(value, tuple | list):
            return [self.numpy(v) for v in value]
        return value if value is None or isinstance(value, np.ndarray) else self.to_array(value)

    def to_array(self, tensor: Any) -> Array:
        """One tensor as an array."""
        return np.asarray(tensor)

    def array(self, value: Any) -> Any:
        """The framework's tensor for an array."""
        raise NotImplementedError

    def differentiate(self, function: Any, *arrays: Array) -> tuple[Array, list[Array]]:
        """The value of a function of tensors, in float64, and its gradients."""
        raise NotImplementedError

    def random(self, seed: int) -> Any:
        """The source that the framework's draws take."""
        raise NotImplementedError

    def seed_everything(self, seed: int) -> None:
        """Seeds the framework's own generator."""
        raise NotImplementedError

    def call(self, model: Any, **inputs: Any) -> Any:
        """The model's output, no gradient wanted."""
        return model(**inputs)

    def run(self, model: Any, **inputs: Any) -> SimpleNamespace:
        """The output's fields as arrays; the cache stays what it is."""
        out, names = self.call(model, **inputs), ModelOutput.__annotations__
        return SimpleNamespace(
            **dict.fromkeys(names)
            | {k: v if k == "past_key_values" else self.numpy(v) for k, v in out.items()}
        )

    def generate(self, model: Any, input_ids: Any, **settings: Any) -> Any:
        """Generated ids."""
        return self.numpy(model.generate(input_ids, **settings))

    def gradients(self, model: Any, head: Head, **inputs: Any) -> dict[str, Array]:
        """The gradient of the loss for each parameter, by canonical name and in canonical shape."""
        raise NotImplementedError

    def train(self, model: Any, batches: list[Any], config: TrainConfig) -> dict[str, Array]:
        """The parameters after one optimizer step per batch."""
        training = importlib.import_module(f"opt_{self.name}.training")
        checkpoint = importlib.import_module(f"opt_{self.name}.checkpoint")
        optimizer = training.make_optimizer(model, config)
        for step, batch in enumerate(batches):
            training.train_step(model, optimizer, batch, config, step)
        specs = param_specs(model.config, "causal_lm")
        return {s.name: self.numpy(checkpoint.get_parameter(model, s)) for s in specs}

    def fit(self, model: Any, batches: Any, config: TrainConfig) -> list[float]:
        """Trains a model and returns the losses."""
        losses: list[float] = []
        training = importlib.import_module(f"opt_{self.name}.training")
        training.fit(model, batches, config, lambda step, loss: losses.append(loss))
        return losses

    def evaluate(self, model: Any, batches: Any) -> float:
        """Mean loss over batches."""
        return importlib.import_module(f"opt_{self.name}.training").evaluate(model, batches)


def make_backend(name: str) -> Backend:
    """The adapter of a framework."""
    module = importlib.import_module(f"tests.support.backend_{name}")
    return getattr(module, f"{PREFIXES[name] or 'Torch'}Backend")(name)
