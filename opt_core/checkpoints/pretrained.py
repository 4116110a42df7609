"""Models in and out of folders, as far as no framework is needed.

`from_pretrained` opens a checkpoint here and is left with making the model and placing the tensors;
`save_pretrained` hands its tensors over.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Protocol

from numpy.typing import NDArray

from opt_core.adapters.folders import split_adapter
from opt_core.adapters.merging import merge_adapter
from opt_core.checkpoints.load import LoadPlan, open_checkpoint, plan_load
from opt_core.checkpoints.save import save_checkpoint
from opt_core.config import DTYPES, OPTConfig
from opt_core.errors import ConfigError
from opt_core.generation.config import GenerationConfig
from opt_core.hub import resolve
from opt_core.initialization import initial_value
from opt_core.params import Head, ParamSpec, param_specs
from opt_core.quantization import check_scheme


class Model(Protocol):
    """The part of a backend's model that is needed here."""

    head: ClassVar[Head]
    config: OPTConfig
    generation_config: GenerationConfig


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint that fits a model: what a backend's `from_pretrained` streams from.

    Attributes:
        path: The folder or file it lies in.
        plan: What is loaded from it.
        dtype: Type to load as; the stored one in place of "auto".
    """

    path: Path
    plan: LoadPlan
    dtype: str

    @property
    def config(self) -> OPTConfig:
        """The configuration to build."""
        return self.plan.config

    def stream(
        self, progress: Callable[[int, int], None] | None
    ) -> Iterator[tuple[ParamSpec, NDArray[Any]]]:
        """Reads the tensors one at a time (`LoadPlan.stream`), then makes those of a fresh head.

        The user's call, to which a warning about a fresh head points, is that of the model's
        `from_pretrained`, which calls the backend's, which iterates over this.

        Args:
            progress: Called after each tensor with the bytes read so far and in all.

        Yields:
            Each parameter with its array, in the canonical (torch) layout and the stored type.
        """
        yield from self.plan.stream(progress=progress)
        for spec in self.plan.fresh:
            warnings.warn(
                f"{self.path}: no {spec.name} in this checkpoint; "
                "it is freshly initialised and needs training",
                stacklevel=4,
            )
            yield spec, initial_value(spec, self.config, seed=0)

    def set_generation_config(self, model: Model) -> None:
        """Gives a language model the settings of generation_config.json, where there is one."""
        home = _home(self.path)
        if model.head == "causal_lm" and (home / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(home)


def open_pretrained(
    head: Head,
    path_or_hub_id: str | PathLike[str],
    dtype: str,
    config: OPTConfig | None,
    quantize: str | None,
    dtypes: Sequence[str] = DTYPES,
    adapter: str | PathLike[str] | None = None,
    **hub: Any,
) -> Pretrained:
    """Finds a checkpoint and compares it with a model; no tensor is read.

    Args:
        head: The head that is to sit on the decoder.
        path_or_hub_id: Folder, weight file, hub id, or "mini"; or an adapter's folder, which is
            merged into the model that it names.
        dtype: One of `dtypes`, or "auto" for the stored one.
        config: Replaces the checkpoint's config.json.
        quantize: One of `opt_core.quantization.SCHEMES`, or None.
        dtypes: What the backend can load as.
        adapter: A PEFT adapter's folder or hub id, which is merged into the weights.
        **hub: As in `opt_core.hub.resolve`.

    Raises:
        CheckpointError: Files are missing or damaged, or do not fit the configuration.
        ConfigError: The configuration is malformed, or an option is not one of the above.
    """
    if dtype not in (*dtypes, "auto"):
        raise ConfigError(f"dtype: expected one of {', '.join(dtypes)} or auto, received {dtype!r}")
    check_scheme(quantize)
    path, read = split_adapter(resolve(path_or_hub_id, **hub), adapter, **hub)
    checkpoint = open_checkpoint(path)  # first: it knows where weights may be instead
    config = config or OPTConfig.from_pretrained(_home(path))
    plan = plan_load(checkpoint, config, head)
    for note in checkpoint.notes:
        warnings.warn(note, stacklevel=4)  # the user's call, as in `Pretrained.stream`
    stored = plan.entries[0][1].dtype.name
    plan = plan if read is None else merge_adapter(plan, head, read)
    return Pretrained(path, plan, stored if dtype == "auto" else dtype)


def save_pretrained(
    model: Model,
    folder: str | PathLike[str],
    fetch: Callable[[ParamSpec], NDArray[Any]],
    dtype: str,
    max_shard_size: str | int,
    config: OPTConfig | None = None,
) -> None:
    """Writes a model as a canonical folder: config.json, generation_config.json and safetensors.

    Args:
        model: The model.
        folder: Where to; made if missing, other files in it stay.
        fetch: Gives the values of a parameter, in the canonical layout.
        dtype: Type to store, such as "float16".
        max_shard_size: As in `save_checkpoint`.
        config: What to write in place of the model's configuration.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    config = config or model.config
    specs = param_specs(config, model.head)
    save_checkpoint(
        Path(folder),
        config,
        {spec.name: lambda spec=spec: fetch(spec) for spec in specs},
        specs,
        dtype=dtype,
        max_shard_size=max_shard_size,
        architecture=re.sub("^(TF|Flax)", "", type(model).__name__),
    )
    model.generation_config.save_pretrained(folder)


def _home(path: Path) -> Path:
    return path if path.is_dir() else path.parent
