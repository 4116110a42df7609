"""Training without a framework: its settings, the loop and its folder, adapters."""

from typing import TYPE_CHECKING

from opt_core.lazy_names import lazy_names
from opt_core.training.config import TrainConfig

if TYPE_CHECKING:
    from opt_core.training.loop import RunResult, Trainer, run
    from opt_core.training.lora import Adapter, save_adapter
    from opt_core.training.run_folder import read_metrics

__all__ = [
    "Adapter",
    "RunResult",
    "TrainConfig",
    "Trainer",
    "read_metrics",
    "run",
    "save_adapter",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "loop": ["RunResult", "Trainer", "run"],
        "lora": ["Adapter", "save_adapter"],
        "run_folder": ["read_metrics"],
    },
)
