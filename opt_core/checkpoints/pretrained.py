"""Models in and out of folders, as far as no framework is needed.

`from_pretrained` opens a checkpoint here and is left with making the model and placing the tensors;
`save_pretrained` hands its tensors over.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from opt_core.adapters.folders import split_adapter
from opt_core.adapters.merging import merge_adapter
from opt_core.checkpoints.offload import must_offload
from opt_core.checkpoints.plan import LoadPlan, plan_load
from opt_core.checkpoints.quantized.tensor import stored_scheme
from opt_core.checkpoints.save import save_checkpoint, save_quantized_checkpoint
from opt_core.checkpoints.sources import held_checkpoint, open_any
from opt_core.compatibility.loading import LoadOptions, choose_file, read_arguments
from opt_core.compatibility.notices import notice
from opt_core.compatibility.saving import SaveOptions
from opt_core.compatibility.subclasses import own_values, read_own_values
from opt_core.config import OPTConfig
from opt_core.config_checks import DTYPES
from opt_core.config_values import dtype_name
from opt_core.errors import CheckpointError, ConfigError
from opt_core.generation.config import GenerationConfig
from opt_core.hub import resolve
from opt_core.initialization import initial_value
from opt_core.params import Head, ParamSpec, param_specs
from opt_core.quantization import check_scheme, scheme_of

_FIELDS = [f.name for f in dataclasses.fields(OPTConfig)]
_OWN = ("dtype", "device", "attn_implementation", "progress", "config", "quantize")


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
        quantize: The scheme that weights are kept by, asked for or that of the files, or None.
        options: The caller's further arguments.
    """

    path: Path
    plan: LoadPlan
    dtype: str
    quantize: str | None
    options: LoadOptions

    @property
    def config(self) -> OPTConfig:
        """The configuration to build."""
        return self.plan.config

    @property
    def device(self) -> str | None:
        """The device that a `device_map` names, "auto", or None."""
        return self.options.device

    def check_place(self, instead: str) -> None:
        """Checks a `device_map` where the framework has another way to say it.

        Raises:
            ConfigError: It names another device than the framework's choice.
        """
        if self.device not in (None, "auto", "cpu"):
            raise ConfigError(
                f"device_map: expected None or 'auto', received {self.device!r}; use {instead}"
            )

    def check_in_memory(self) -> None:
        """Refuses to leave the weights in their files, for frameworks that cannot.

        Raises:
            ConfigError: It is asked for.
        """
        self.must_offload(
            "expected False: XLA's programs hold all weights in memory; use PyTorch's models "
            "(--backend torch)", 0.0
        )  # fmt: skip

    def must_offload(self, obstacle: str | None, available: float) -> bool:
        """Whether the weights are to stay in their files.

        Args:
            obstacle: What the backend has against it, or None.
            available: Bytes of memory that can be had.

        Raises:
            ConfigError: That is asked for, and cannot be.
        """
        return must_offload(self.options.offload, self.plan, self.dtype, obstacle, available)

    def stream(
        self, progress: Callable[[int, int], None] | None
    ) -> Iterator[tuple[ParamSpec, Any]]:
        """Reads the tensors one at a time (`LoadPlan.stream`), then makes those of a fresh head.

        Args:
            progress: Called after each tensor with the bytes read so far and in all.

        Yields:
            Each parameter with its array, in the canonical (torch) layout and the stored type, or,
            where the model keeps it quantised, with its `QuantizedTensor`.
        """
        yield from self.plan.stream(progress=progress, quantize=self.quantize)
        for spec in self.plan.fresh:
            shape = self.plan.misshapen.get(spec.name)
            reason = "no {0} in this checkpoint" if shape is None else "{0} has shape {1}, not {2}"
            notice(
                f"{self.path}: {reason.format(spec.name, shape, spec.shape)}; "
                "it is freshly initialised and needs training"
            )
            yield spec, initial_value(spec, self.config, seed=0)

    def finish(self, model: Any) -> Any:
        """Gives a language model its settings of generation, and the caller what was asked for.

        Args:
            model: The model, its parameters in place.

        Returns:
            The model; with `output_loading_info`, it and a dict; with `_do_init=False`, it and its
            parameters.
        """
        fresh = read_own_values(model, self.plan, self.path)
        home, given = _home(self.path), self.options.generation_config
        if given is not None:
            model.generation_config = GenerationConfig.from_any(given)
        elif model.head == "causal_lm" and (home / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(home)
        if not self.options.initialize:
            return model._without_params()
        if not self.options.with_info:
            return model
        shapes, misshapen = {s.name: s.shape for s in self.plan.fresh}, self.plan.misshapen
        return model, {
            "missing_keys": [*(name for name in shapes if name not in misshapen), *fresh],
            "unexpected_keys": self.plan.aside,
            "mismatched_keys": [(name, had, shapes[name]) for name, had in misshapen.items()],
            "error_msgs": [],
        }


def open_pretrained(
    head: Head,
    path_or_hub_id: str | PathLike[str] | None,
    dtype: Any,
    config: Any,
    quantize: str | None,
    dtypes: Sequence[str] = DTYPES,
    adapter: str | PathLike[str] | None = None,
    as_array: Callable[[Any], NDArray[Any]] = np.asarray,
    has_own_layers: bool = False,
    **arguments: Any,
) -> Pretrained:
    """Finds a checkpoint and compares it with a model; no tensor is read.

    Args:
        head: The head that is to sit on the decoder.
        path_or_hub_id: Folder, weight file, hub id, or "mini"; None with a `state_dict`. An
            adapter's folder is merged into the model that it names.
        dtype: One of `dtypes`, as a name or a framework's type; "auto" for the stored one.
        config: Replaces the checkpoint's config.json: a configuration, a dict, or where one is.
        quantize: One of `opt_core.quantization.SCHEMES`, or None.
        dtypes: What the backend can load as.
        adapter: A PEFT adapter's folder or hub id, which is merged into the weights.
        as_array: Turns a tensor of a `state_dict` into an array.
        has_own_layers: Whether the model is of a class that a caller wrote.
        **arguments: As `opt_core.compatibility.loading` sorts them.

    Raises:
        CheckpointError: Files are missing or damaged, or do not fit the configuration.
        ConfigError: The configuration is malformed, or an option is not one of the above.
    """
    path_or_hub_id = arguments.pop("pretrained_model_name_or_path", path_or_hub_id)
    name = dtype_name(arguments.pop("torch_dtype", dtype)) or "float32"
    options = read_arguments(arguments, _FIELDS, _OWN)
    if name not in (*dtypes, "auto"):
        expected = ", ".join(dtypes)
        raise ConfigError(f"dtype: expected one of {expected} or auto, received {dtype!r}")
    quantize = options.quantize if quantize is None else quantize
    check_scheme(quantize)
    if options.state_dict is None or config is None:
        if path_or_hub_id is None:
            raise CheckpointError("from_pretrained: without a folder, pass config= and state_dict=")
        path = resolve(path_or_hub_id, convertible=True, variant=options.variant, **options.hub)
    else:
        path = Path("state_dict")
    path, read = split_adapter(path, adapter, **options.hub)
    if config is not None:
        config = OPTConfig.from_any(config).copy()
    if options.state_dict is None:
        checkpoint, read_config, notes = open_any(choose_file(path, options))
        config = read_config() if config is None else config
    else:
        checkpoint, notes = held_checkpoint(options.state_dict, as_array), ()
        config = OPTConfig.from_pretrained(_home(path)) if config is None else config
    if options.changes:
        config = config.replace(**options.changes)
    config.name_or_path = str(path_or_hub_id or "")
    plan = plan_load(checkpoint, config, head, options.skip_misshapen, has_own_layers)
    for note in (*checkpoint.notes, *notes, *plan.notes):
        notice(note)
    stored = plan.entries[0][1].dtype.name
    name = stored if name == "auto" else name
    config.dtype = "float32" if name.startswith("mixed_") else name  # Keras' policies
    quantize = _scheme(path, plan, quantize)
    plan = plan if read is None else merge_adapter(plan, head, read)
    return Pretrained(path, plan, name, quantize, options)


def _scheme(path: Path, plan: LoadPlan, quantize: str | None) -> str | None:
    """The scheme to keep weights by: that of the files, if they are quantised by us.

    Raises:
        ConfigError: Another one is asked for, which would round what is rounded.
    """
    stored = stored_scheme(plan.entries)
    if stored is None or quantize in (None, stored):
        return quantize or stored
    raise ConfigError(
        f"{path}: quantize: expected {stored!r}, which the weights are stored in, or None, "
        f"received {quantize!r}; take the original checkpoint"
    )


def save_pretrained(
    model: Model,
    options: SaveOptions,
    fetch: Callable[[ParamSpec], NDArray[Any]],
    dtype: str,
    config: OPTConfig | None = None,
) -> None:
    """Writes a model as a canonical folder: config.json, generation_config.json and safetensors.

    Args:
        model: The model.
        options: Where to, and how; the folder is made if missing, other files in it stay.
        fetch: Gives the values of a parameter, in the canonical layout.
        dtype: Type to store, such as "float16".
        config: What to write in place of the model's configuration.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    config = config or model.config
    specs = param_specs(config, model.head)
    save_checkpoint(
        options.folder,
        config,
        {spec.name: lambda spec=spec: fetch(spec) for spec in specs},
        specs,
        dtype=dtype,
        max_shard_size=options.max_shard_size,
        architecture=_architecture(model),
        more=own_values(model, options.state_dict),
    )
    GenerationConfig.from_any(model.generation_config).save_pretrained(options.folder)


def save_quantized(
    model: Model, options: SaveOptions, fetch: Callable[[ParamSpec], Any], dtype: str
) -> None:
    """Writes a quantised model, as `opt_core.checkpoints.save.save_quantized_checkpoint` does.

    Args:
        model: The model.
        options: Where to, and how.
        fetch: Gives the values of a parameter, or its `QuantizedTensor`.
        dtype: Type of what is stored in floating point, such as "float16".

    Raises:
        CheckpointError: The folder cannot be written.
    """
    specs = param_specs(model.config, model.head)
    a_layer_s = next(spec for spec in specs if scheme_of(spec, "int4") == "int4")
    save_quantized_checkpoint(
        options.folder,
        model.config,
        fetch,
        specs,
        dtype,
        fetch(a_layer_s).scheme,
        options.max_shard_size,
        _architecture(model),
        more=own_values(model),
    )
    GenerationConfig.from_any(model.generation_config).save_pretrained(options.folder)


def _architecture(model: Model) -> str:
    """The class' name in `transformers`."""
    return re.sub("^(TF|Flax|FSDP)", "", type(model).__name__)


def _home(path: Path) -> Path:
    return path if path.is_dir() else path.parent
