"""Lists the datasets of one HDF5 file as JSON. Run by `conversion.formats.hdf5`, never imported.

The HDF5 library is C, and a damaged file can make it crash, loop or allocate without end. Here that
ends a process that holds nothing and may write nothing, and the caller reports the file.
"""

import io
import json
import sys
from importlib import import_module
from typing import Any

CPU_SECONDS = 4
MEMORY = 1 << 30
MAX_OBJECTS = 10_000
MAX_DEPTH = 16
MAX_NAME = 1024


def limit() -> None:
    """Gives up time, memory and the right to write, where the system can take them."""
    try:
        import resource
    except ImportError:
        return
    for what, most in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most if hard < 0 else min(most, hard), hard))


def datasets(file: Any, h5py: Any) -> dict[str, Any]:
    """Every dataset: where it lies, or why it does not lie in one piece."""
    found: dict[str, Any] = {}
    groups, seen = [("", file)], 0
    while groups:
        path, group = groups.pop()
        for name in group:
            full = f"{path}{name}"
            seen += 1
            if seen > MAX_OBJECTS or full.count("/") > MAX_DEPTH or len(full) > MAX_NAME:
                raise ValueError(f"more groups than any checkpoint has, at {full[:80]!r}")
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise ValueError(f"{full!r} is a link to somewhere else")
            item = group[name]
            if isinstance(item, h5py.Group):
                groups.append((f"{full}/", item))
            elif isinstance(item, h5py.Dataset):
                found[full] = describe(item, h5py)
    return found


def describe(dataset: Any, h5py: Any) -> dict[str, Any]:
    """Shape, data type and place of one dataset."""
    layout = dataset.id.get_create_plist()
    dtype = dataset.dtype.str
    if dtype == "|V2" and dataset.attrs.get("dtype") == "bfloat16":  # as Keras 3 stores it
        dtype = "bfloat16"
    plain = layout.get_layout() == h5py.h5d.CONTIGUOUS and not layout.get_external_count()
    return {
        "shape": list(dataset.shape or ()),
        "dtype": dtype,
        "offset": dataset.id.get_offset() if plain else None,
    }


class _ServedFile(io.RawIOBase):
    """A file of which the caller has every byte: "AT COUNT" on stdout asks for some on stdin."""

    def __init__(self, size: int) -> None:
        self.size, self.at = size, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.size - self.at))
        print(self.at, count, flush=True)
        view[:count] = sys.stdin.buffer.read(count)
        self.at += count
        return count


def main(path: str, size: str | None = None) -> dict[str, Any]:
    """The answer about a file; with a size, the caller is asked for its bytes."""
    h5py: Any = import_module("h5py")
    limit()
    try:
        opened: Any = path if size is None else _ServedFile(int(size))
        with h5py.File(opened, "r", **({"locking": False} if size is None else {})) as file:
            if file.userblock_size:
                raise ValueError("something else comes before its contents")
            return {"datasets": datasets(file, h5py)}
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, MemoryError) as error:
        return {"error": " ".join(str(error).split()) or type(error).__name__}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
