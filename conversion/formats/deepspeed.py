"""DeepSpeed's checkpoint folders: the module's own file, where it holds the whole model.

With ZeRO-1 and ZeRO-2 it does. ZeRO-3 and parallel models are in parts that DeepSpeed's script,
which it puts beside them, joins.
"""

import re
from pathlib import Path
from typing import cast

from conversion.formats.metaseq_pickle import InertMachine
from opt_core.checkpoints.load import Checkpoint, is_plain_name, unwrapped
from opt_core.checkpoints.tensor_file import TensorFile
from opt_core.checkpoints.tensors import StoredTensor
from opt_core.checkpoints.torch_format import TorchArchive
from opt_core.checkpoints.torch_pickle import StorageView
from opt_core.checkpoints.wrappers import unwrap_state
from opt_core.errors import CheckpointError

_STATES = "*model_states.pt"
_MAX_LATEST = 1 << 10
_MANY = 1000


def find_deepspeed(path: Path) -> Path | None:
    """The folder of a checkpoint's states: the path itself, or the last one in it.

    Args:
        path: Folder with `latest` or `global_step...` in it, one of the latter, or a file in it.

    Raises:
        CheckpointError: `latest` names no folder beside it.
    """
    if not path.is_dir():
        return path.parent if path.match(_STATES) else None
    if next(path.glob(_STATES), None):
        return path
    steps = {
        int(match[1]): folder
        for folder in path.glob("global_step*")
        if (match := re.fullmatch(r"global_step(\d{1,18})", folder.name)) and folder.is_dir()
    }
    latest = path / "latest"
    if latest.is_file():
        with latest.open("rb") as file:
            name = file.read(_MAX_LATEST).decode("ascii", "replace").strip()
        if is_plain_name(name) and next((path / name).glob(_STATES), None):
            return path / name
        if steps or (path / "zero_to_fp32.py").exists():
            raise CheckpointError(
                f"{latest}: expected the name of a folder with model states, received {name!r:.60}"
            )
    return steps[max(steps)] if steps else None


def open_deepspeed(folder: Path) -> Checkpoint:
    """Reads the header of the model's file.

    Args:
        folder: From `find_deepspeed`.

    Raises:
        CheckpointError: It is damaged, or in parts.
    """
    names = sorted(path.name for path, _ in zip(folder.glob(_STATES), range(_MANY), strict=False))
    script = "zero_to_fp32.py, which DeepSpeed puts into the checkpoint"
    if any(name.startswith(("zero_", "bf16_zero_")) for name in names):
        raise CheckpointError(
            f"{folder}: ZeRO-3 keeps the weights in parts: join them with {script}: "
            "`python zero_to_fp32.py . OUTPUT`"
        )
    if len(names) != 1:
        found = f"found {len(names)}: the parts of a parallel model" if names else "found none"
        raise CheckpointError(
            f"{folder}: expected one mp_rank_00_model_states.pt, {found}; join them with {script}, "
            "or save it with save_16bit_model"
        )
    path = folder / names[0]
    archive = TorchArchive(TensorFile(path))
    state = unwrap_state(InertMachine(path).parse(archive.pickle))
    views = cast(dict[object, object], state) if isinstance(state, dict) else {}
    tensors: dict[str, StoredTensor] = {
        name: archive.tensor(name, view)
        for name, view in views.items()
        if isinstance(name, str) and isinstance(view, StorageView)
    }
    if not tensors or len(tensors) < len(views):
        raise CheckpointError(f"{path}: expected a dict of tensors under 'module'")
    if any(0 in tensor.shape for tensor in tensors.values()):
        raise CheckpointError(
            f"{path}: tensors without elements: ZeRO-3 keeps them in parts: join them with {script}"
        )
    notes: tuple[str, ...] = ()
    if all(tensor.dtype.itemsize == 2 for tensor in tensors.values()):
        kind = next(iter(tensors.values())).dtype.name
        notes = (f"{path}: {kind}, as the model ran; {script}, makes float32 of its optimizer's",)
    return unwrapped(Checkpoint(folder, (path,), dict(tensors), "deepspeed", notes))
