"""Reads the pickle inside a torch file without being able to run anything.

An unpickler that merely forbids names still runs what it permits, and a hostile file can exhaust
memory or the C stack (a deeply nested tuple as a dict key crashes the interpreter) before any name
is looked up. This one walks the opcodes that `torch.save` writes for a state dict and builds dicts,
lists, tuples, numbers, strings and tensor descriptions; any other opcode or name ends the reading.
"""

import pickletools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import ml_dtypes
import numpy as np

from opt_core.errors import CheckpointError

STORAGE_DTYPES: dict[str, np.dtype[Any]] = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
"""The storage types a state dict may hold."""

_GLOBALS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *STORAGE_DTYPES,
}
_MAX_STACK = 10_000  # picklers hand over a container's items a thousand at a time
_MARK = object()


@dataclass(frozen=True)
class Storage:
    """A run of elements that tensors are cut from.

    Attributes:
        key: Its name in the archive's `data` folder.
        dtype: Data type of one element.
        numel: Number of elements.
    """

    key: str
    dtype: np.dtype[Any]
    numel: int


@dataclass(frozen=True)
class StorageView:
    """A tensor: part of a storage.

    Attributes:
        storage: What it is cut from.
        offset: First element, counted from the start of the storage.
        shape: Shape.
        strides: Elements to step per dimension.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def uneven_strides(self) -> tuple[int, ...] | None:
        """The strides, or None where the elements lie in C order without gaps."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and step != expected:
                return None if 0 in self.shape else self.strides
            expected *= size
        return None


@dataclass(frozen=True)
class Global:
    """The name of a class or function, which stays a name.

    Attributes:
        name: Module and name.
    """

    name: str


def parse_pickle(data: bytes, path: Path) -> object:
    """The object a torch pickle describes, tensors as `StorageView`.

    Args:
        data: The contents of the archive's data.pkl.
        path: Name of the torch file, for messages.

    Raises:
        CheckpointError: The pickle is damaged, or asks for anything but tensors in dicts.
    """
    return PickleMachine(path).parse(data)


class PickleMachine:
    """Walks a pickle's opcodes; a subclass may take more of them, but nothing is ever run.

    Args:
        path: Name of the torch file, for messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def parse(self, data: bytes | BinaryIO) -> object:
        """The object a pickle describes.

        Args:
            data: The pickle, or a file that stands at its start and is left at its end.

        Raises:
            CheckpointError: The pickle is damaged, or asks for what this machine does not take.
        """
        try:
            return self._run(data)
        except CheckpointError:
            raise
        except (
            ValueError, TypeError, LookupError, AttributeError, struct.error, OverflowError,
            MemoryError, RecursionError,
        ) as error:  # fmt: skip
            what = str(error) or type(error).__name__
            raise CheckpointError(f"{self.path}: damaged pickle: {what}") from None

    def _run(self, data: bytes | BinaryIO) -> object:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                break
            self._step(opcode.name, cast(Any, argument))
            if len(self.stack) > _MAX_STACK:
                raise ValueError(f"more than {_MAX_STACK} values on the stack")
        return self.stack.pop()

    def _step(self, opcode: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                push(_MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                if opcode == "LONG1" and abs(argument) >= 2**63:
                    raise ValueError("an integer of more than 64 bits")
                push(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE":
                argument.encode()  # a lone surrogate cannot be printed, so it cannot be reported
                push(argument)
            case "EMPTY_TUPLE":
                push(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple(reversed([pop() for _ in range(int(opcode[-1]))])))
            case "TUPLE":
                push(tuple(self._pop_to_mark()))
            case "EMPTY_LIST":
                push([])
            case "APPEND":
                self._append([pop()])
            case "APPENDS":
                self._append(self._pop_to_mark())
            case "EMPTY_DICT":
                push({})
            case "SETITEM":
                self._set([pop(), pop()][::-1])
            case "SETITEMS":
                self._set(self._pop_to_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "GLOBAL" | "INST":
                push(self._global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                push(self._global(module, name))
            case "BINPERSID":
                push(self._storage(pop()))
            case "REDUCE":
                arguments, function = pop(), pop()
                push(self._call(function, arguments))
            case "BUILD":
                self._build(pop())
            case _:
                self._other(opcode, argument)

    def _build(self, _state: object) -> None:
        # An OrderedDict's attributes: `_metadata`, the version numbers of modules.
        self._container(dict)

    def _other(self, opcode: str, _argument: Any) -> None:
        raise CheckpointError(
            f"{self.path}: refused pickle opcode {opcode}: not a file of tensors alone; "
            "re-save it with torch.save(model.state_dict(), path)"
        )

    def _pop_to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark on the stack")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _container(self, kind: type[Any]) -> Any:
        top = self.stack[-1]
        if type(top) is not kind:
            raise ValueError(f"expected a {kind.__name__}, received {type(top).__name__}")
        return top

    def _append(self, items: list[Any]) -> None:
        self._container(list).extend(items)

    def _set(self, items: list[Any]) -> None:
        target, pairs = self._container(dict), iter(items)
        for key, value in zip(pairs, pairs, strict=True):
            if type(key) not in (str, int):
                raise ValueError(f"a dict key of type {type(key).__name__}")
            if key in target:
                raise ValueError(f"{key!r} occurs twice")
            target[key] = value

    def _global(self, module: object, name: object) -> Global:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"
        if full == "torch._utils._rebuild_tensor_v3":
            raise CheckpointError(
                f"{self.path}: tensors of float8 or another type that no weights of OPT have; save "
                "them as float16 or bfloat16"
            )
        if full not in _GLOBALS:
            raise CheckpointError(
                f"{self.path}: refused {full!r}: a weight file may hold tensors only, and nothing "
                "that runs; re-save it with torch.save(model.state_dict(), path)"
            )
        return Global(full)

    def _storage(self, identity: object) -> Storage:
        match identity:
            case ("storage", Global(kind), str(key), str(), int(numel)) if (
                kind in STORAGE_DTYPES and numel >= 0
            ):
                return Storage(key, STORAGE_DTYPES[kind], numel)
            case _:
                raise ValueError("a storage that is not described as torch describes one")

    def _call(self, function: object, arguments: object) -> object:
        name = function.name if isinstance(function, Global) else type(function).__name__
        values = cast(tuple[Any, ...], arguments) if isinstance(arguments, tuple) else (None,)
        if name == "collections.OrderedDict" and not values:
            return {}
        if name == "torch._utils._rebuild_parameter" and isinstance(values[0], StorageView):
            return values[0]
        if name == "torch._utils._rebuild_tensor_v2":
            return _rebuild_tensor(*values)
        raise ValueError(f"{name} called with arguments torch does not give it")


def _rebuild_tensor(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _requires_grad: object,
    _hooks: object,
    metadata: object = None,
) -> StorageView:
    if not isinstance(storage, Storage) or metadata:  # metadata: a conjugate or negative view
        raise ValueError("a tensor that is not plainly stored")
    (first,), sizes, steps = _sizes((offset,)), _sizes(shape), _sizes(strides)
    if len(sizes) != len(steps):
        raise ValueError("a tensor whose shape and strides differ in length")
    return StorageView(storage, first, sizes, steps)


def _sizes(values: object) -> tuple[int, ...]:
    sizes = cast(tuple[object, ...], values) if isinstance(values, tuple) else (None,)
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("an offset, shape or stride that is no size")
    return cast(tuple[int, ...], sizes)
