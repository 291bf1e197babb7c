"""A partial parser for XLA's serialised CPU executables, to sort their object files and to find their machine code.

XLA compiles the kernels of a program on several threads, and stores their object files in the order of completion.
The order has no effect, so `canonical` sorts the object files. Two compilations of a program then result in the same
bytes.

The file consists of two protocol buffer messages: ``SerDesMetadata``, preceded by its length, and
``ExecutableAndOptionsProto`` (xla/pjrt/pjrt_executable.proto). Field 1 of the second message is a
``CompilationResultProto`` (xla/service/cpu/executable.proto). In that message, field 8 occurs once for each object
file, and field 9 is the target machine. The wire format is described at
https://protobuf.dev/programming-guides/encoding.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_RESULT, _OBJECT, _CONTENTS = 1, 8, 1
_ELF = b"\x7fELF"
_SHT_PROGBITS, _SHF_EXECINSTR = 1, 4
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class _Field:
    """A field of a message.

    Attributes:
        number: the field's number.
        raw: the encoded field with its tag.
        value: payload of a length-delimited field; empty for any other.
    """

    number: int
    raw: bytes
    value: bytes


class _UnknownForm(Exception):
    """The bytes do not have the format that this module knows."""


def canonical(executable: bytes) -> bytes:
    """Return the executable with its object files sorted, or unchanged if its format is unknown."""
    try:
        head, fields = _split(executable)
        return head + b"".join(_sorted_objects(f) if f.number == _RESULT else f.raw for f in fields)
    except _UnknownForm:
        return executable


def object_files(executable: bytes) -> tuple[bytes, ...] | None:
    """Return the ELF object files in the executable; None if its format is unknown."""
    try:
        results = [f.value for f in _split(executable)[1] if f.number == _RESULT]
        objects = [f.value for result in results for f in _fields(result) if f.number == _OBJECT]
        return tuple(f.value for value in objects for f in _fields(value) if f.number == _CONTENTS)
    except _UnknownForm:
        return None


def code_sections(elf: bytes) -> Iterator[bytes]:
    """Yield the sections of an ELF file that contain instructions (ELF-64: System V gABI, chapter 4).

    Raises:
        struct.error: the data is not an ELF file.
    """
    offset, entry_bytes, count = struct.unpack_from("<Q10xHH", elf, 0x28)
    for i in range(count):
        _, kind, flags, _, start, size = struct.unpack_from("<IIQQQQ", elf, offset + i * entry_bytes)
        if kind == _SHT_PROGBITS and flags & _SHF_EXECINSTR:
            yield elf[start : start + size]


def _split(executable: bytes) -> tuple[bytes, list[_Field]]:
    """Return the bytes before the second message, and the second message's fields."""
    length, start = _varint(executable, 0)
    if start + length > len(executable):
        raise _UnknownForm
    return executable[: start + length], list(_fields(executable[start + length :]))


def _sorted_objects(field: _Field) -> bytes:
    """Return the encoded field with its object files sorted."""
    parts = list(_fields(field.value))
    objects = iter(sorted(p.raw for p in parts if p.number == _OBJECT and _ELF in p.value))
    value = b"".join(next(objects) if p.number == _OBJECT and _ELF in p.value else p.raw for p in parts)
    # Only the order has changed, so the field keeps its tag and length.
    return field.raw[: len(field.raw) - len(field.value)] + value


def _fields(data: bytes) -> Iterator[_Field]:
    at = 0
    while at < len(data):
        tag, start = _varint(data, at)
        kind, length = tag & 7, 0
        if kind == _VARINT:
            _, end = _varint(data, start)
        elif kind == _BYTES:
            length, start = _varint(data, start)
            end = start + length
        elif kind in (_FIXED64, _FIXED32):
            end = start + (8 if kind == _FIXED64 else 4)
        else:
            raise _UnknownForm
        if end > len(data):
            raise _UnknownForm
        yield _Field(tag >> 3, data[at:end], data[start:end] if kind == _BYTES else b"")
        at = end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Decode a variable-length integer; return its value and the position after the integer."""
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise _UnknownForm
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, at
