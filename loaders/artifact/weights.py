"""``weights.safetensors``: one copy of the weights, mapped and never parsed or copied.

A valid safetensors file (header length as 8 bytes little-endian, a JSON header, then the data) that keeps two
rules beyond the format's own: the header is padded with spaces until the data begins on a 64-byte boundary, and
tensors whose sizes are no multiple of 64 come last, so that every tensor but those behind the first such one
begins on a boundary too. The CPU runtime takes an array over as it lies only when it is so aligned.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .errors import PrecastError
from .record import parse_json

ALIGNMENT = 64
# safetensors' own bound on a header.
_MAX_HEADER = 100 << 20
# NumPy's own bound.
_MAX_AXES = 64
_DTYPES: Mapping[str, np.dtype] = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def _in_file_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    return sorted(specs, key=lambda spec: (spec.bytes % ALIGNMENT != 0, spec.name))


def _header(specs: Sequence[TensorSpec]) -> bytes:
    entries, offset = {}, 0
    for spec in specs:
        place = [offset, offset + spec.bytes]
        entries[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": place}
        offset += spec.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_weights(
    path: Path, specs: Sequence[TensorSpec], parts: Callable[[TensorSpec], Iterable[np.ndarray]]
) -> str:
    """Writes tensors one part at a time, so that no more than a part is ever in memory.

    Args:
        path: the file to write; must not exist.
        specs: what to write, in any order.
        parts: gives a tensor's contents in order, in arrays whose bytes follow one another in the file.

    Returns:
        The file's sha256.

    Raises:
        OSError: when the disk does not take it.
    """
    digest = hashlib.sha256()
    ordered = _in_file_order(specs)
    with path.open("xb") as file:
        for data in _pieces(ordered, parts):
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def _pieces(
    specs: Sequence[TensorSpec], parts: Callable[[TensorSpec], Iterable[np.ndarray]]
) -> Iterator[bytes | memoryview]:
    yield _header(specs)
    for spec in specs:
        written = 0
        for part in parts(spec):
            if part.dtype != spec.dtype:
                raise ValueError(f"{spec.name}: expected parts of {spec.dtype}, found {part.dtype}")
            written += part.nbytes
            yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        if written != spec.bytes:
            raise ValueError(f"{spec.name}: expected {spec.bytes} bytes, found {written}")


def map_weights(source: Path | BinaryIO) -> dict[str, np.ndarray]:
    """Maps a file written by `write_weights`; pages are read from disk when first touched.

    Args:
        source: its path, or the file itself, open and at its beginning, so that what is mapped is what was checked.

    Returns:
        Views into the mapping by tensor name. The mapping is private and lives as long as its views.

    Raises:
        PrecastError: for a file that is not a safetensors file, or whose header does not describe exactly its data.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            return map_weights(file)
    path, size = Path(source.name), os.fstat(source.fileno()).st_size
    length = int.from_bytes(source.read(8), "little")
    if size < 8 or length > min(_MAX_HEADER, size - 8):
        raise PrecastError(f"{path}: expected a safetensors file, found one whose header does not fit in it.")
    header = parse_json(source.read(length), str(path))
    # Private and writable, because NumPy does not hand read-only arrays to a plain DLPack consumer. Nothing writes to
    # it, so no page of it is ever copied.
    mapping = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_COPY)
    if not isinstance(header, dict):
        raise PrecastError(f"{path}: expected a safetensors header, found {header!r:.60}.")
    entries = [_entry(path, name, e) for name, e in header.items() if name != "__metadata__"]
    _check_cover(path, entries, size - 8 - length)
    start = 8 + length
    return {
        name: np.frombuffer(mapping, dtype, prod(shape), start + begin).reshape(shape)
        for name, dtype, shape, begin, _ in entries
    }


_Entry = tuple[str, np.dtype, tuple[int, ...], int, int]


def _entry(path: Path, name: str, entry: object) -> _Entry:
    """One tensor of a header: name, type, shape, begin and end; its size is what its shape says."""
    try:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError
        if not isinstance(entry["shape"], list) or len(entry["shape"]) > _MAX_AXES:
            raise ValueError
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if any(type(n) is not int or not 0 <= n < 2**63 for n in (*shape, begin, end)):
            raise ValueError
        if end - begin != prod(shape) * dtype.itemsize:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise PrecastError(
            f"{path}: the header's entry of tensor {name!r} is not understood: {entry!r:.80}."
        ) from None
    return name, dtype, shape, begin, end


def _check_cover(path: Path, entries: Sequence[_Entry], size: int) -> None:
    """Tensors must follow one another without gap or overlap, to the end of the file."""
    at = 0
    for name, _, _, begin, end in sorted(entries, key=lambda e: (e[3], e[4])):
        if begin != at:
            raise PrecastError(f"{path}: tensor {name!r} begins at byte {begin} of the data, expected {at}.")
        at = end
    if at != size:
        raise PrecastError(f"{path}: the tensors cover {at} bytes of data, the file holds {size}.")
