"""A model in training, as `opt_core.training.loop` wants it, but for what its framework holds."""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

from opt_core.config import OPTConfig
from opt_core.team import Team
from opt_core.training.config import TrainConfig
from opt_core.training.loop import identity


class BaseTrainer:
    """A model and its optimizer; a backend adds `updates`, `get` and `put`.

    Args:
        model: The model, trained in place; `make_optimizer` makes it ready.
        config: How to train it.
    """

    training: ClassVar[Any]
    """The backend's module `training`."""
    lora: ClassVar[Any]
    """The backend's module `lora`."""

    def __init__(self, model: Any, config: TrainConfig):
        self.model, self.config = model, config
        self.optimizer: Any = self.training.make_optimizer(model, config)
        self.specs = config.trained_specs(model.config, model.head)
        self.identity = identity(model.config, model.head)

    @property
    def team(self) -> Team:
        """The processes that train the model together."""
        return Team()

    @property
    def row_parts(self) -> tuple[int, int]:
        """Which part of a batch's rows this process computes, from 0, and how many there are."""
        return 0, 1

    @property
    def is_spread(self) -> bool:
        """Whether tensors are spread over devices."""
        return False

    @classmethod
    def make(
        cls,
        model_class: Any,
        name: str | PathLike[str],
        config: TrainConfig,
        model_config: OPTConfig,
        from_scratch: bool = False,
        device: str | None = None,
        mesh: Any = None,
    ) -> Self:
        """Loads a model, or makes one, and gets it ready for training.

        Args:
            model_class: Class of the model.
            name: Folder, hub id, or "mini".
            config: How to train.
            model_config: The model's configuration; `config` may change its dropout.
            from_scratch: Start from random weights, not from the model's.
            device: Such as "cuda", where the framework asks where to; None: its own choice.
            mesh: Devices to spread the model over (`opt_*.sharding`); None: it stays whole.
        """
        model_config = config.model_config(model_config)
        options = cls.model_options(config, from_scratch, device, mesh)
        if not from_scratch:
            model = model_class.from_pretrained(name, config=model_config, **options)
        else:
            model = model_class(model_config, seed=config.seed, **options)
            model = model if device is None else model.to(device)
        return cls(model, config)

    @classmethod
    def model_options(
        cls, config: TrainConfig, from_scratch: bool, device: str | None, mesh: Any
    ) -> dict[str, Any]:
        """Further options that the framework loads or makes a model with: none here.

        Args:
            config: How to train.
            from_scratch: Whether it is made.
            device: None, where the framework places its tensors itself.
            mesh: As in `make`.
        """
        assert device is None
        return {} if mesh is None else {"mesh": mesh}

    def step(self, batch: Any, step: int) -> tuple[float, float]:
        """Takes one step (`train_step`) with dropout."""
        return self.training.train_step(self.model, self.optimizer, batch, self.config, step)

    def evaluate(self, batches: Iterable[Any]) -> float:
        """The mean loss over batches, without dropout."""
        return self.training.evaluate(self.model, batches)

    def export(self, folder: Path) -> None:
        """Writes the model as a Hugging Face folder, adapters merged."""
        self.lora.merge(self.model)
        self.model.save_pretrained(folder)
        self.lora.unmerge(self.model)

    def export_adapter(self, folder: Path, base: str) -> None:
        """Writes the adapters as PEFT does."""
        self.lora.save_adapter(self.model, folder, base)
