"""The container of a GGUF file: its metadata and the position of each tensor.

The header states the size of each of its parts. The reader compares each size with the remaining bytes before it
allocates memory, so time and memory are at most proportional to the file's length. A sparse file can be very long and
still take no space on the disk, so fixed limits apply as well. Format and limits:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and gguf_init_from_file of ggml.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from ..files import first_bytes, plain_file, refuse_stand_in
from .tensors import GgufTensor

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT_KEY, _ALIGNMENT = "general.alignment", 32

# Limits far above what published files need. They bound the cost of a header in a large or sparse file.
_MOST_KEYS = _MOST_TENSORS = 1 << 16
_LONGEST_HEADER = 1 << 27
_LONGEST_KEY, _LONGEST_NAME, _MOST_AXES = 65_535, 63, 4
# Minimum sizes in bytes, with an empty name: of a key with its type and value, and of a tensor's header entry.
_LEAST_KEY, _LEAST_TENSOR = 13, 24

# Types of metadata values, by their number in the format, as letters. `struct` and NumPy use the same letters.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Types of tensors that NumPy supports. Rows of tensors of all other types become rows of bytes.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"}

# Prefixes of the keys whose strings must be exact. Other strings only describe the model; in them, bytes that are not
# UTF-8 become U+FFFD.
_EXACT = ("tokenizer.", "general.architecture", "general.type")


@dataclass(frozen=True, kw_only=True)
class Container:
    """The uninterpreted contents of a GGUF file.

    Attributes:
        metadata: the value of each key; arrays become lists.
        tensors: each tensor by its name, mapped but not yet read.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A tensor as the header describes it.

    Attributes:
        axes: shape, innermost axis first.
        type: number of the type in the format.
        offset: offset of the data from the start of the section that contains the data of all tensors.
        at: offset of the header entry in the file.
    """

    axes: tuple[int, ...]
    type: int
    offset: int
    at: int


def read_container(path: Path) -> Container:
    """Read the header of a GGUF file and map its tensors.

    Raises:
        PrecastError: the file cannot be read, is not little-endian GGUF of a known version, or states a size that is
            larger than the rest of the file.
    """
    _check_magic(path)
    try:
        mapped = np.memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise PrecastError(
            f"{path}: cannot be mapped into memory ({error}); copy it to a local disk."
        ) from error
    cursor = _Cursor(path, mapped.data)
    tensor_count, key_count = _read_counts(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        _read_pair(cursor, metadata)
    entries: dict[str, _Entry] = {}
    for _ in range(tensor_count):
        _read_entry(cursor, entries)
    alignment = _alignment(cursor, metadata)
    start = cursor.at + -cursor.at % alignment
    tensors = {
        name: _stored(cursor, mapped, name, entry, start, alignment) for name, entry in entries.items()
    }
    return Container(metadata=metadata, tensors=tensors)


def _check_magic(path: Path) -> None:
    if not plain_file(path):
        raise PrecastError(f"{path}: there is no such file; check the path.")
    refuse_stand_in(path)
    magic = first_bytes(path, len(MAGIC))
    if magic != MAGIC:
        raise PrecastError(
            f"{path}: is not a GGUF file (expected it to begin with {MAGIC!r}, found {magic!r}); fetch it again, or"
            " name another file."
        )


class _Cursor:
    """A reading position in the header.

    Attributes:
        path: the file, for messages.
        at: the offset of the next byte.
    """

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path = path
        self.at = len(MAGIC)
        self._data = data

    @property
    def length(self) -> int:
        return len(self._data)

    def read(self, count: int, what: str) -> memoryview:
        """Read `count` bytes; `what` names these bytes in errors."""
        left = len(self._data) - self.at
        if count > left:
            raise self.error(
                self.at,
                f"expected {count:,} bytes of {what}, but only {left:,} are left, so the file is truncated or"
                " damaged; fetch it again",
            )
        if self.at + count > _LONGEST_HEADER:
            raise self.error(
                self.at,
                f"expected a header of at most {_LONGEST_HEADER:,} bytes, found more; convert the model again",
            )
        taken = self._data[self.at : self.at + count]
        self.at += count
        return taken

    def number(self, letter: str, what: str) -> Any:
        """Read one number of the type that `letter` denotes in `struct`; `what` names the number in errors."""
        form = struct.Struct(f"<{letter}")
        return form.unpack(self.read(form.size, what))[0]

    def text(self, what: str, longest: int | None = None) -> memoryview:
        """Read the length of a string, then the string itself; `what` names the string in errors."""
        start = self.at
        length = self.number("Q", f"the length of {what}")
        if longest is not None and length > longest:
            raise self.error(
                start,
                f"expected {what} to have at most {longest:,} bytes, found {length:,}; convert the model again",
            )
        return self.read(length, what)

    def error(self, at: int, sentence: str) -> PrecastError:
        """Return an error that states the offset of the wrong bytes."""
        return PrecastError(f"{self.path}: at byte {at:,}, {sentence}.")


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    """Check the version, then return the numbers of tensors and keys."""
    version = cursor.number("I", "the version")
    if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
        raise PrecastError(
            f"{cursor.path}: is a big-endian GGUF file; convert it to little-endian (gguf-convert-endian) first."
        )
    if version not in _VERSIONS:
        expected = " or ".join(map(str, _VERSIONS))
        raise cursor.error(
            len(MAGIC),
            f"expected GGUF version {expected}, found {version}; convert the model again with a"
            " current converter",
        )
    start = cursor.at
    tensors, keys = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of keys")
    for count, most, least, what in (
        (keys, _MOST_KEYS, _LEAST_KEY, "metadata keys"),
        (tensors, _MOST_TENSORS, _LEAST_TENSOR, "tensors"),
    ):
        room = min(most, (cursor.length - cursor.at) // least)
        if count > room:
            raise cursor.error(
                start,
                f"expected at most {room:,} {what}, found {count:,}, so the file is truncated or damaged; fetch it"
                " again",
            )
    return tensors, keys


# --- metadata -----------------------------------------------------------------------------------------------


def _read_pair(cursor: _Cursor, metadata: dict[str, Any]) -> None:
    start = cursor.at
    key = str(cursor.text("a metadata key", _LONGEST_KEY), "utf-8", "replace")
    if key in metadata:
        raise cursor.error(start, f"found the metadata key {key:.80} a second time; convert the model again")
    metadata[key] = _read_value(cursor, key, cursor.number("I", f"the type of {key:.80}"))


def _read_value(cursor: _Cursor, key: str, kind: int) -> Any:
    what = f"{key:.80}"
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind], what)
    if kind == _STRING:
        return _decoded(cursor, key, cursor.text(what))
    if kind == _ARRAY:
        return _read_array(cursor, key, what)
    raise cursor.error(
        cursor.at - 4, f"expected {what} to have a type from 0 to 12, found {kind}; convert the model again"
    )


def _read_array(cursor: _Cursor, key: str, what: str) -> list[Any]:
    kind = cursor.number("I", f"the type in {what}")
    count = cursor.number("Q", f"the length of {what}")
    if kind in _SCALARS:
        dtype = np.dtype(f"<{_SCALARS[kind]}")
        values: list[Any] = np.frombuffer(cursor.read(count * dtype.itemsize, what), dtype).tolist()
        return values
    if kind == _STRING:
        _check_room(cursor, count, what)
        return [_decoded(cursor, key, cursor.text(what)) for _ in range(count)]
    nested = "a list of lists" if kind == _ARRAY else f"values of type {kind}"
    raise cursor.error(
        cursor.at - 12,
        f"expected {what} to be a list of numbers or strings, found {nested}; convert the model again",
    )


def _check_room(cursor: _Cursor, count: int, what: str) -> None:
    """Check that `count` strings fit into the remaining bytes; each takes at least the eight bytes of its length."""
    if count * 8 > cursor.length - cursor.at:
        cursor.read(count * 8, what)


def _decoded(cursor: _Cursor, key: str, text: memoryview) -> str:
    if not key.startswith(_EXACT):
        return str(text, "utf-8", "replace")
    try:
        return str(text, "utf-8")
    except UnicodeDecodeError as error:
        at = cursor.at - len(text) + error.start
        raise cursor.error(
            at,
            f"expected UTF-8 in {key:.80}, found the byte 0x{text[error.start]:02x} in {bytes(text[:40])!r}, so the"
            " converter has cut a character in two; convert the model again with a current converter, or use the"
            " model's Hugging Face checkpoint",
        ) from error


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    value = metadata.get(_ALIGNMENT_KEY, _ALIGNMENT)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value & (value - 1):
        raise PrecastError(
            f"{cursor.path}: expected {_ALIGNMENT_KEY} to be a power of two, found {value!r:.80}; convert the model"
            " again."
        )
    return value


# --- tensors ------------------------------------------------------------------------------------------------


def _read_entry(cursor: _Cursor, entries: dict[str, _Entry]) -> None:
    start = cursor.at
    name = str(cursor.text("a tensor's name", _LONGEST_NAME), "utf-8", "replace")
    if name in entries:
        raise cursor.error(start, f"found the tensor {name} a second time; convert the model again")
    count = cursor.number("I", f"the number of axes of {name}")
    if not 1 <= count <= _MOST_AXES:
        raise cursor.error(
            cursor.at - 4,
            f"expected {name} to have 1 to {_MOST_AXES} axes, found {count}; convert the model again",
        )
    axes = tuple(cursor.number("Q", f"the shape of {name}") for _ in range(count))
    if 0 in axes:
        raise cursor.error(
            cursor.at - 8 * count,
            f"expected {name} to have values, found shape {list(axes)}; convert the model again",
        )
    kind, offset = cursor.number("I", f"the type of {name}"), cursor.number("Q", f"the offset of {name}")
    entries[name] = _Entry(axes=axes, type=kind, offset=offset, at=start)


def _stored(
    cursor: _Cursor, mapped: np.memmap[Any, Any], name: str, entry: _Entry, start: int, alignment: int
) -> GgufTensor:
    """Check that a tensor lies within the mapped file, and return a view of it."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if entry.type not in set(GGMLQuantizationType):
        raise cursor.error(
            entry.at,
            f"found the tensor {name} stored as type {entry.type}, which the installed gguf library does not know;"
            " update it (pip install -U gguf) or convert the model to another type",
        )
    kind = GGMLQuantizationType(entry.type)
    block, size = GGML_QUANT_SIZES[kind]
    if entry.axes[0] % block:
        raise cursor.error(
            entry.at,
            f"expected rows of {name} to have a multiple of {block} values ({kind.name}), found {entry.axes[0]};"
            " convert the model again",
        )
    begin, length = start + entry.offset, prod(entry.axes) // block * size
    if entry.offset % alignment or begin + length > cursor.length:
        raise cursor.error(
            entry.at,
            f"the tensor {name} of {length:,} bytes at byte {begin:,} is not aligned to {alignment} bytes, or exceeds"
            f" the {cursor.length:,} bytes of the file, so the file is truncated or damaged; fetch it again",
        )
    rows = tuple(reversed(entry.axes[1:]))
    data = mapped[begin : begin + length].view(_DTYPES.get(kind.name, "u1")).reshape(*rows, -1)
    return GgufTensor(shape=(*rows, entry.axes[0]), type=kind, data=data)
