"""A trainer of a few numbers, for tests of the run loop: no framework, the same rules.

As a script it trains in a folder, so that a test can kill it:
    python -m tests.support.fake_trainer FOLDER STEPS PAUSE
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from opt_core.config import OPTConfig
from opt_core.data.batches import Batches
from opt_core.params import ParamSpec
from opt_core.team import Team
from opt_core.training.config import TrainConfig
from opt_core.training.loop import identity, run

CONFIG = TrainConfig(
    max_steps=20, batch_size=2, sequence_length=4, learning_rate=0.1, save_every=3, eval_every=5
)


class FakeTrainer:
    """Follows the mean of its batches, with noise in place of dropout."""

    team, row_parts, is_spread = Team(), (0, 1), False
    specs = (ParamSpec("x.weight", (3,), "linear", ("hidden",)),)

    def __init__(self, config: TrainConfig = CONFIG, losses: Any = None, pause: float = 0):
        self.config, self.losses, self.pause = config, losses, pause
        self.identity = identity(OPTConfig(), "causal_lm")
        self.updates = 0
        self.slots = {slot: np.zeros(3, np.float32) for slot in ("value", "mean", "square")}
        self.exported = 0

    def step(self, batch: Any, step: int) -> tuple[float, float]:
        time.sleep(self.pause)
        if self.losses and not np.isfinite(self.losses(step)):
            return self.losses(step), 1.0
        noise = np.random.default_rng(self.config.dropout_seed(step)).normal(size=3)
        self.slots["mean"] += np.float32(0.1) * (batch["input_ids"].mean() + noise)
        self.slots["value"] += self.slots["mean"].astype(np.float32)
        self.updates += 1
        return float(self.slots["value"].sum()), 1.0

    def evaluate(self, batches: Any) -> float:
        count = sum(1 for _ in batches)
        return float(abs(self.slots["value"]).sum()) / count

    def get(self, slot: Any, spec: ParamSpec) -> Any:
        return self.slots[slot]

    def put(self, slot: Any, spec: ParamSpec, values: Any) -> None:
        self.slots[slot] = np.array(values)

    def export(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        np.save(folder / "value.npy", self.slots["value"])

    def export_adapter(self, folder: Path, base: str) -> None:
        raise AssertionError("no adapters here")


def blocks() -> list[Any]:
    return list(np.random.default_rng(0).integers(0, 9, (14, 4)))


def train(folder: Path, trainer: FakeTrainer, **options: Any) -> Any:
    """Runs a trainer in a folder."""
    config = trainer.config
    batches = Batches(blocks(), config.batch_size, config.seed)
    options.setdefault("validation", lambda: Batches(blocks()[:4], 2, 0, False, 1))
    return run(trainer, batches, config, folder, **options)  # type: ignore[arg-type]


if __name__ == "__main__":
    folder, steps, pause = sys.argv[1:]
    config = CONFIG.replace(max_steps=int(steps))
    train(Path(folder), FakeTrainer(config, pause=float(pause)), resume=True)
