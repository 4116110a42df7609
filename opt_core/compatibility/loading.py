"""Arguments of `transformers`' `from_pretrained`: honoured, without effect, or refused by name."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from opt_core.compatibility.config_keys import ALIASES, COMMON, FIXED, SYNONYMS, near_miss
from opt_core.errors import ArgumentError, ConfigError, MissingFileError

HUB = ("revision", "token", "local_files_only", "cache_dir", "force_download", "subfolder")
"""Arguments of `opt_core.hub.resolve`."""

WITHOUT_EFFECT = frozenset([
    # Always so here: memory-saving, safe loading, one process that moves what it reads.
    "low_cpu_mem_usage", "trust_remote_code", "weights_only", "_fast_init", "offload_folder",
    "offload_state_dict", "offload_buffers", "max_memory", "use_kernels", "tqdm_class",
    # The hub's client decides, or has always done so.
    "proxies", "resume_download", "mirror", "user_agent", "code_revision", "_commit_hash",
    "_from_auto", "_from_pipeline", "from_pt", "load_weight_prefix", "adapter_kwargs",
    "adapter_name", "disable_mmap", "fusion_config", "kernel_config", "experts_implementation",
    # Of Flax' former models: a head that is missing is drawn by a seed of its own.
    "seed", "input_shape",
])  # fmt: skip
"""Arguments that are accepted and change nothing."""

_REFUSED = {
    "gguf_file": "GGUF files are not read; take the original checkpoint",
    "tp_plan": "tensor parallelism is Flax' `mesh=`",
    "tp_size": "tensor parallelism is Flax' `mesh=`",
    "device_mesh": "tensor parallelism is Flax' `mesh=`",
    "use_flash_attention_2": 'pass attn_implementation="flash_attention_2"',
    "key_mapping": "rename the tensors in the file",
}
_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_DISK = "disk"  # accelerate's name for weights that stay in files
_HANDLED = (
    *("device_map", "state_dict", "ignore_mismatched_sizes", "output_loading_info", "variant"),
    *("use_safetensors", "from_tf", "from_flax", "generation_config", "quantization_config"),
    *("load_in_8bit", "load_in_4bit", "_do_init", "use_auth_token", "offload"),
)


@dataclass(frozen=True)
class LoadOptions:
    """The arguments of a call of `from_pretrained` beside the backend's own.

    Attributes:
        hub: Arguments of `opt_core.hub.resolve`.
        changes: Fields of the configuration that replace the file's, and other attributes of it.
        device: Device that a `device_map` names, "auto", or None.
        offload: True, False or "auto", as `opt_core.checkpoints.offload` has it; True for a
            `device_map` of "disk".
        quantize: The scheme asked for, or None.
        state_dict: Tensors in place of the file's, by name.
        generation_config: Settings in place of the file's.
        skip_misshapen: Whether tensors of another shape are made anew (`ignore_mismatched_sizes`).
        with_info: Whether to return what was missing, too (`output_loading_info`).
        initialize: False where Flax' callers want the parameters beside the model (`_do_init`).
        preferred: Weight files to take before others, if they are there.
        required: Weight files of which one has to be there; none: any will do.
        variant: Part of the names of weight files, such as "fp16".
    """

    hub: dict[str, Any]
    changes: dict[str, Any]
    device: str | None = None
    offload: Any = False
    quantize: str | None = None
    state_dict: Mapping[str, Any] | None = None
    generation_config: Any = None
    skip_misshapen: bool = False
    with_info: bool = False
    initialize: bool = True
    preferred: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    variant: str | None = None
    unused: dict[str, Any] = field(default_factory=dict[str, Any])


def read_arguments(
    arguments: Mapping[str, Any], fields: Iterable[str], own: Iterable[str] = ()
) -> LoadOptions:
    """Sorts the arguments of `from_pretrained`.

    Args:
        arguments: Names and values.
        fields: Names of the configuration's fields.
        own: Names of the backend's own arguments, to suggest.

    Raises:
        ArgumentError: One is unknown; the nearest name is suggested.
        ConfigError: One cannot be honoured; what to use instead is named.
    """
    options = sort_arguments(arguments, fields)
    for name in options.unused:
        names = [*own, *fields, *HUB, *_HANDLED, *WITHOUT_EFFECT]
        near = near_miss(name, names) or next(iter(difflib.get_close_matches(name, names, 1)), None)
        hint = f"its own are {', '.join(own)}" if own else "it is no field of the configuration"
        hint = f"did you mean {near!r}?" if near else hint
        raise ArgumentError(f"from_pretrained: unknown argument {name!r}; {hint}")
    return options


def sort_arguments(arguments: Mapping[str, Any], fields: Iterable[str]) -> LoadOptions:
    """As `read_arguments`, unknown names in `unused`."""
    for name, hint in _REFUSED.items():
        if arguments.get(name):
            raise ConfigError(f"from_pretrained: {name} is not supported; {hint}")
    known = {*fields, *ALIASES, *SYNONYMS, *FIXED, *COMMON, "label2id"} - {"dtype", "torch_dtype"}
    taken = {*HUB, *_HANDLED, *WITHOUT_EFFECT, *_REFUSED}
    hub = {name: arguments[name] for name in HUB if arguments.get(name) is not None}
    if arguments.get("use_auth_token") is not None:
        hub.setdefault("token", arguments["use_auth_token"])
    device = _one_device(arguments.get("device_map"))
    return LoadOptions(
        hub=hub,
        changes={k: v for k, v in arguments.items() if k in known - taken},
        device="cpu" if device == _DISK else device,
        offload=arguments.get("offload", False) or device == _DISK,
        quantize=_quantization(arguments),
        state_dict=arguments.get("state_dict"),
        generation_config=arguments.get("generation_config"),
        skip_misshapen=bool(arguments.get("ignore_mismatched_sizes")),
        with_info=bool(arguments.get("output_loading_info")),
        initialize=arguments.get("_do_init") is not False,
        preferred=_preferred(arguments),
        required=("model.safetensors",) if arguments.get("use_safetensors") else (),
        variant=arguments.get("variant"),
        unused={k: v for k, v in arguments.items() if k not in known | taken},
    )


def choose_file(path: Path, options: LoadOptions) -> Path:
    """The weight file or index of a folder that the arguments ask for; the folder where none does.

    Raises:
        MissingFileError: It is not there.
    """
    if not path.is_dir():
        return path
    if options.variant:
        stems = [("model", "safetensors"), ("pytorch_model", "bin")]
        stems = stems[: 1 if options.required else 2]
        names = [
            name
            for stem, suffix in stems
            for name in (
                f"{stem}.{suffix}.index.{options.variant}.json",
                f"{stem}.{options.variant}.{suffix}",
            )
        ]
        found = next((path / name for name in names if (path / name).exists()), None)
        if found is None:
            raise MissingFileError(f"{path}: variant: expected one of {', '.join(names)}")
        return found
    for name in options.required or options.preferred:
        for file in (path / f"{name}.index.json", path / name):
            if file.exists():
                return file
    if options.required:
        raise MissingFileError(
            f"{path}: use_safetensors: no {' or '.join(options.required)}; leave it out to read "
            "another format"
        )
    return path


def _one_device(device_map: Any) -> str | None:
    """The one device of a device map."""
    devices: Any = device_map
    if isinstance(device_map, Mapping):
        values: set[str] = {str(v) for v in device_map.values()}  # pyright: ignore[reportUnknownArgumentType,reportUnknownVariableType]
        if len(values) != 1:
            raise ConfigError(
                f"device_map: expected one device for the whole model, received {sorted(values)}; "
                'pass "auto", a device, or {"": device}'
            )
        devices = values.pop()
    if devices is None:
        return None
    name = str(devices)
    if name in _AUTOMATIC:
        return "auto"
    return f"cuda:{name}" if name.isdigit() else name


def _quantization(arguments: Mapping[str, Any]) -> str | None:
    given: Any = arguments.get("quantization_config")
    if isinstance(given, str):
        return given
    for name, ours in (("load_in_8bit", "int8"), ("load_in_4bit", "int4")):
        if arguments.get(name):
            raise ConfigError(f'from_pretrained: {name} is bitsandbytes\'; pass quantize="{ours}"')
    if given is None:
        return None
    # A dict, or an object of another library with the same names.
    values = cast("dict[str, Any]", given if hasattr(given, "keys") else vars(given))
    eight = values.get("load_in_8bit") or values.get("_load_in_8bit") or values.get("bits") == 8
    raise ConfigError(
        f"quantization_config: expected 'int8' or 'int4', received a {type(given).__name__}; pass "
        f'quantize="{"int8" if eight else "int4"}" in its place'
    )


def _preferred(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    if arguments.get("from_tf"):
        return ("tf_model.h5",)
    if arguments.get("from_flax"):
        return ("flax_model.msgpack",)
    return ("pytorch_model.bin",) if arguments.get("use_safetensors") is False else ()
