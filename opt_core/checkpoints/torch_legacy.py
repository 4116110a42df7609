"""Torch's files from before 1.6, or without its zip format: five pickles, then the storages.

They are read as the newer ones are: nothing in them is executed, and tensors stay in the file.
"""

import io
from typing import cast

from opt_core.checkpoints.tensor_file import TensorFile
from opt_core.checkpoints.tensors import StoredTensor
from opt_core.checkpoints.torch_pickle import PickleMachine, Storage, StorageView
from opt_core.errors import CheckpointError

LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first pickle: a constant."""

_VERSION = 1001
_MAX_PICKLES = 1 << 24
_LENGTH = 8  # bytes in front of each storage: its number of elements


class _Machine(PickleMachine):
    """Also notes which storages there are; each has a sixth entry here, for parts of another."""

    storages: dict[str, Storage]

    def _storage(self, identity: object) -> Storage:
        entries = cast(tuple[object, ...], identity) if isinstance(identity, tuple) else ()
        if len(entries) == 6 and entries[5] is None:
            entries = entries[:5]
        storage = super()._storage(entries)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {storage.key!r} has two sizes")
        return storage


class LegacyFile:
    """A file as torch wrote it before its zip format.

    Args:
        source: The open file.

    Attributes:
        content: The object it holds, tensors as `StorageView`.

    Raises:
        CheckpointError: It is damaged, or holds anything but tensors in dicts.
    """

    def __init__(self, source: TensorFile) -> None:
        self.source = source
        file = io.BytesIO(source.bytes_at(0, _MAX_PICKLES))
        storages: dict[str, Storage] = {}

        def next_pickle() -> object:
            machine = _Machine(source.path)
            machine.storages = storages
            return machine.parse(file)

        file.seek(len(LEGACY_MAGIC))
        version, system = next_pickle(), next_pickle()
        order = cast(dict[str, object], system) if isinstance(system, dict) else {}
        if version != _VERSION or order.get("little_endian") is not True:
            raise CheckpointError(f"{source.path}: of a version or byte order that is not read")
        self.content = next_pickle()
        keys = next_pickle()
        self.starts = self._find(storages, keys, file.tell())

    def _find(self, storages: dict[str, Storage], keys: object, at: int) -> dict[str, int]:
        path = self.source.path
        starts: dict[str, int] = {}
        for key in cast(list[object], keys) if isinstance(keys, list) else []:
            storage = storages.get(key) if isinstance(key, str) else None
            length = self.source.bytes_at(at, _LENGTH)
            if storage is None or int.from_bytes(length, "little") != storage.numel:
                raise CheckpointError(f"{path}: its storages are not what it lists: it is damaged")
            starts[storage.key] = at + _LENGTH
            at += _LENGTH + storage.numel * storage.dtype.itemsize
        if starts.keys() != storages.keys() or at != self.source.size:
            raise CheckpointError(
                f"{path}: {at} bytes expected, {self.source.size} found: it is truncated or "
                "damaged; download it again"
            )
        return starts

    def tensor(self, name: str, view: StorageView) -> StoredTensor:
        """Where a tensor of the pickle lies.

        Raises:
            CheckpointError: Its storage is too short for it.
        """
        storage, dtype = view.storage, view.storage.dtype
        start = self.starts[storage.key] + view.offset * dtype.itemsize
        tensor = StoredTensor(name, view.shape, dtype, self.source, start, view.uneven_strides)
        if view.offset * dtype.itemsize + tensor.extent > storage.numel * dtype.itemsize:
            raise CheckpointError(f"{self.source.path}: {name} reaches out of its storage")
        return tensor
