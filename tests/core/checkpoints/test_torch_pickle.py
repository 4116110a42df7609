"""Opcodes that no torch pickle of tensors holds are refused, and nothing is ever run."""

import builtins
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core.checkpoints.torch_format import read_torch_file
from opt_core.errors import CheckpointError
from tests.support.files.checkpoint_fixtures import (
    ORDERED_DICT,
    PARAMETER,
    STORAGE_NAMES,
    TENSOR,
    Cut,
    call,
    name_of,
    number,
    pickled,
    sequence,
    state_dict,
    storage,
    tensor,
    text,
    type_of,
    write_torch_zip,
)

BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
PLAIN = tensor(storage("0", "float32", 24), Cut("0", 0, (4, 6), (6, 1)))


def write(path: Path, pickle_: bytes, **layout: Any) -> None:
    write_torch_zip(path, pickle_, {"0": BASE.tobytes()}, **layout)


def refused(path: Path, message: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_file(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.bin"


class Runs:
    """Pickles as a call of anything."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def attacks(marker: Path) -> dict[str, Any]:
    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Runs(os.system, shell),
        "eval": Runs(builtins.eval, code),
        "exec": Runs(builtins.exec, code),
        "open": Runs(open, str(marker), "w"),
        "import": Runs(__import__, "os"),
        "nested": {"a": [("b", {"c": Runs(os.system, shell)})]},
        "argument": {"a": Runs(dict, [("b", Runs(os.system, shell))])},
    }


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", attacks(Path()))
def test_nothing_in_a_pickle_is_run(path, tmp_path, name, protocol):
    marker = tmp_path / "ran"
    attack = pickle.dumps(attacks(marker)[name], protocol)
    write(path, attack)
    refused(path, "refused")
    assert not marker.exists()
    if name in ("os.system", "eval", "exec", "open"):  # the attacks are real ones
        pickle.loads(attack)
        assert marker.exists()


def test_a_chain_of_attribute_look_ups_is_not_followed(path, tmp_path):
    marker = tmp_path / "ran"
    module = call(name_of("builtins", "__import__"), text("os"))
    function = call(name_of("builtins", "getattr"), module, text("system"))
    attack = pickled(call(function, text(f"touch {marker}")))
    write(path, attack)
    refused(path, "refused 'builtins.getattr'")
    assert not marker.exists()
    pickle.loads(attack)
    assert marker.exists()


OS_SYSTEM = name_of("os", "system")
REFUSED = {
    "a global alone": (OS_SYSTEM, "refused 'os.system'"),
    "inside metadata": (
        ORDERED_DICT + b"}" + text("_metadata") + OS_SYSTEM + b"sb",
        "refused 'os.system'",
    ),
    "a stack global": (text("os") + text("system") + b"\x93", "refused 'os.system'"),
    "a dotted stack global": (
        text("collections") + text("OrderedDict.fromkeys") + b"\x93",
        "refused 'collections.OrderedDict.fromkeys'",
    ),
    "a module attribute": (
        text("torch") + text("_utils._rebuild_tensor_v2.__globals__") + b"\x93",
        "refused",
    ),
    "a stack global of a number": (number(1) + text("system") + b"\x93", "refused"),
    "INST": (b"(" + text("touch x") + b"ios\nsystem\n", "refused 'os.system'"),
    "OBJ": (b"(" + OS_SYSTEM + text("touch x") + b"o", "refused 'os.system'"),
    "OBJ of a permitted name": (b"(" + name_of("collections", "OrderedDict") + b"o", "opcode OBJ"),
    "NEWOBJ": (name_of("collections", "OrderedDict") + b")\x81", "opcode NEWOBJ"),
    "an extension code": (b"\x82\x01", "opcode EXT1"),
    "a string persistent id": (b"Pabc\n", "opcode PERSID"),
    "bytes": (b"B\x02\0\0\0ab", "opcode BINBYTES"),
    "another rebuild": (name_of("torch._utils", "_rebuild_sparse_tensor"), "refused"),
    "a quantised storage": (storage("0", "QInt8", 24), "refused 'torch.QInt8Storage'"),
    "float8": (name_of("torch._utils", "_rebuild_tensor_v3"), "float8 or another type"),
    "torch.load": (name_of("torch", "load"), "refused 'torch.load'"),
    "BUILD on a function": (TENSOR + b"}" + text("__code__") + number(1) + b"sb", "damaged pickle"),
    "BUILD on a tensor": (PLAIN + b"}" + text("offset") + number(1) + b"sb", "damaged pickle"),
    "a called storage": (call(name_of("torch", "FloatStorage"), number(9)), "FloatStorage called"),
    "a called tensor": (call(PLAIN, number(9)), "StorageView called"),
    "a called number": (call(number(1), number(9)), "int called"),
    "an OrderedDict of arguments": (
        call(name_of("collections", "OrderedDict"), b"]"),
        "OrderedDict called",
    ),
    "a tensor of no storage": (
        call(TENSOR, *([number(0)] * 6)),
        "not plainly stored",
    ),
    "a tensor of too few arguments": (call(TENSOR, number(0)), "damaged pickle"),
    "arguments that are no tuple": (TENSOR + b"]R", "damaged pickle"),
    "a parameter of no tensor": (call(PARAMETER, number(0)), "_rebuild_parameter called"),
    "a parameter of nothing": (PARAMETER + b")R", "damaged pickle"),
    "a negated view": (PLAIN[:-1].removesuffix(b"t") + b"}" + text("neg") + b"\x88stR", "plainly"),
    "a negative offset": (
        tensor(storage("0", "float32", 24), Cut("0", -1, (2,), (1,))),
        "no size",
    ),
    "a negative shape": (tensor(storage("0", "float32", 24), Cut("0", 0, (-2,), (1,))), "no size"),
    "negative strides": (tensor(storage("0", "float32", 24), Cut("0", 9, (2,), (-1,))), "no size"),
    "shape and strides apart": (
        tensor(storage("0", "float32", 24), Cut("0", 0, (2, 2), (1,))),
        "differ in length",
    ),
    "a storage that is none": (sequence(text("storage"), number(1)) + b"Q", "storage that is not"),
    "a negative storage": (storage("0", "float32", -1), "storage that is not"),
    "a 65-bit number": (number(2**65), "64 bits"),
    "a list key": (b"}](KKs", "damaged pickle"),
    "a tuple key": (b"}" + b")" + b"\x85" * 9999 + number(1) + b"s", "dict key of type tuple"),
    "a repeated key": (b"}(" + (text("a") + number(1)) * 2 + b"u", "'a' occurs twice"),
    "a key without value": (b"}(" + text("a") + b"u", "damaged pickle"),
    "no mark": (b"}u", "damaged pickle"),
    "an empty stack": (b"s", "damaged pickle"),
    "an unknown memo": (b"h\x09", "damaged pickle"),
    "a memo of 2^32": (number(1) + b"r\xff\xff\xff\xff", "expected a dict of tensors"),
    "an unknown opcode": (b"\xff", "damaged pickle"),
    "a string of 2^62 bytes": (b"\x8d" + struct.pack("<Q", 2**62), "damaged pickle"),
    "a string of 2^31 bytes": (b"X" + struct.pack("<I", 2**31), "damaged pickle"),
    "a lone surrogate": (b"X\x03\0\0\0\xed\xa0\x80", "damaged pickle"),
    "a flood": (b"}" * 20_000, "values on the stack"),
    "no tensor": (b"}" + text("a") + number(1) + b"s", "'a': expected a tensor, received int"),
    "a nested dict": (b"}" + text("a") + b"}s", "'a': expected a tensor, received dict"),
    "a number for a name": (b"}" + number(1) + PLAIN + b"s", "1: expected a tensor"),
    "a list of tensors": (b"]" + PLAIN + b"a", "expected a dict of tensors, received list"),
    "a tensor alone": (PLAIN, "expected a dict of tensors, received StorageView"),
    "a state dict that is none": (
        b"}" + text("state_dict") + number(3) + b"s",
        "'state_dict': expected a tensor",
    ),
    "a missing storage": (state_dict({"w": PLAIN.replace(text("0"), text("7"))}), "'7' is missing"),
    "a key out of the folder": (
        state_dict({"w": PLAIN.replace(text("0"), text("../data.pkl"))}),
        "is missing",
    ),
    "a storage too long": (
        state_dict({"w": tensor(storage("0", "float32", 25), Cut("0", 0, (2,), (1,)))}),
        "expected 100 bytes, received 96",
    ),
    "a huge storage": (
        state_dict({"w": tensor(storage("0", "float32", 2**62), Cut("0", 0, (2,), (1,)))}),
        "received 96",
    ),
    "a tensor too long": (
        state_dict({"w": tensor(storage("0", "float32", 24), Cut("0", 20, (5,), (1,)))}),
        "w .* of 96",
    ),
    "strides too long": (
        state_dict({"w": tensor(storage("0", "float32", 24), Cut("0", 0, (3, 2), (12, 1)))}),
        "w .* of 96",
    ),
    "strides past the file": (
        state_dict({"w": tensor(storage("0", "float32", 24), Cut("0", 0, (2,), (2**40,)))}),
        "truncated",
    ),
    "an endless expanded tensor": (
        state_dict({"w": tensor(storage("0", "float32", 24), Cut("0", 0, (2**62, 4), (0, 1)))}),
        "impossible shape",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_does_not_write_is_refused(path, name):
    body, message = REFUSED[name]
    write(path, pickled(body))
    refused(path, message)


def test_the_hand_written_files_are_what_python_itself_would_unpickle():
    assert set(STORAGE_NAMES) == set(type_of)
    assert pickle.loads(pickled(ORDERED_DICT)) == {}
    assert pickle.loads(pickled(number(2**40) + b"\x85")) == (2**40,)
