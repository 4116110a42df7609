"""Flax' MessagePack files: lengths that lie, depth, keys that occur twice."""

from tests.support.hostile.cases import CORPUS, overwrite, replace

FLAX = "flax_model.msgpack"
NDARRAY = b"\x93\x91\x02\xa7float32\xc4\x08" + b"\0" * 8


def extension(body: bytes, code: int = 1) -> bytes:
    return b"\xc7" + bytes([len(body), code]) + body


def named(value: bytes) -> bytes:
    return b"\x81\xa1a" + value


def array(old: bytes = b"", new: bytes = b"") -> bytes:
    """A sound array, or one of which a part is another."""
    assert old in NDARRAY
    return extension(NDARRAY.replace(old, new, 1) if old else NDARRAY)


def chunked(shape: bytes, chunk: bytes) -> bytes:
    flag = b"\x83\xb9__msgpack_chunked_array__\xc3"
    return flag + b"\xa5shape\x81\xa10" + shape + b"\xa6chunks\x81\xa10" + chunk


for name, data in {
    "an empty map": b"\x80",
    "a number": b"\x07",
    "a string": b"\xa3abc",
    "a list": b"\x91\x01",
    "bytes": b"\xc4\x01a",
    "nothing but nil": b"\xc0",
    "the code no kind has": b"\xc1",
    "2**32 - 1 entries": b"\xdf\xff\xff\xff\xff",
    "2**32 - 1 items": b"\xdd\xff\xff\xff\xff" + b"\x00" * 64,
    "a billion small items": b"\x81\xa1a\xdd\x3b\x9a\xca\x00" + b"\x90" * 150_000,
    "maps 100,000 deep": b"\x81\xa1a" * 100_000 + b"\xc0",
    "lists 100,000 deep": b"\x91" * 100_000,
    "a name of 4 GiB": b"\x81\xdb\xff\xff\xff\xff" + b"a" * 100,
    "a name of 100 kB": b"\x81\xdb\x00\x01\x86\xa0" + b"a" * 100_000 + b"\xc0",
    "a name that is no text": b"\x81\xa2\xff\xfe\xc0",
    "a name that is a number": b"\x81\x01\xc0",
    "a name that is a list": b"\x81\x91\x01\xc0",
    "a name twice": b"\x82" + (b"\xa1a" + array()) * 2,
    "bytes after the end": b"\x80\x80",
    "an array of 4 GiB": named(b"\xc9\xff\xff\xff\xff\x01" + NDARRAY),
    "a native complex": named(extension(b"\x92\x01\x02", 2)),
    "a numpy scalar": named(extension(NDARRAY, 3)),
    "an extension of no type": named(b"\xd4\x7f\x00"),
    "an array of nothing": named(extension(b"")),
    "an array of objects": named(array(b"\xa7float32", b"\xa6object")),
    "an array of bytes as text": named(array(b"\xc4\x08", b"\xd9\x08")),
    "an array with a shape of text": named(array(b"\x91\x02", b"\x91\xa12")),
    "an array with a negative shape": named(array(b"\x91\x02", b"\x91\xfe")),
    "an array with a shape of true": named(array(b"\x91\x02", b"\x92\x02\xc3")),
    "an array of another size": named(array(b"\x91\x02", b"\x91\x03")),
    "an array with a shape of 2**64": named(array(b"\x91\x02", b"\x91\xcf" + b"\xff" * 8)),
    "an array with four parts": named(array(b"\x93", b"\x94\x01")),
    "an array and more": named(extension(NDARRAY + b"\x01")),
    "an array within an array": named(array(b"\x91\x02", b"\x91" + array())),
    "a leaf that is a string": named(b"\xa1b"),
    "a leaf that is a number": named(b"\xcb" + b"\0" * 8),
    "a leaf that is a list": named(b"\x91" + array()),
    "chunks of nothing": named(b"\x81\xb9__msgpack_chunked_array__\xc3"),
    "chunks of a false shape": named(chunked(b"\x09", array())),
    "chunks of a negative shape": named(chunked(b"\xfe", array())),
    "chunks that are numbers": named(chunked(b"\x02", b"\x02")),
    "chunks of two dimensions": named(chunked(b"\x02", array(b"\x91\x02", b"\x92\x01\x02"))),
    "a control character in a name": b"\x81\xa2\x1b[" + array(),
}.items():
    CORPUS[f"flax: {name}"] = ("flax-msgpack", overwrite(FLAX, data))
CORPUS["flax: another array"] = ("flax-msgpack", replace(FLAX, b"fc1", b"fc9"))
CORPUS["flax: another type"] = ("flax-msgpack", replace(FLAX, b"float32", b"uint256"))
