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
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .errors import PrecastError
from .frozen import Frozen
from .pages import HugePageWriter, advise_huge_pages
from .record import parse_json

ALIGNMENT = 64
# safetensors' own bound on a header.
_MAX_HEADER = 100 << 20
# NumPy's own bound.
_MAX_AXES = 64
# Names of tensors that tell how they are read.
_EMBEDDING, _HEAD = "model.embed_tokens.", "lm_head.weight"
_BFLOAT16 = "BF16"  # which NumPy lacks
_DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorSpec(Frozen):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros that the CPU runtime takes over as they lie."""
    size = prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def numpy_dtype(name: str) -> np.dtype:
    """The type that a manifest calls `name`."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes  # NumPy alone has no such type; float32 artifacts do without

    dtype: np.dtype = np.dtype(ml_dtypes.bfloat16)
    return dtype


def _dtype(name: str) -> np.dtype:
    """The type that a safetensors header calls `name`."""
    return numpy_dtype("bfloat16") if name == _BFLOAT16 else _DTYPES[name]


def _in_file_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    return sorted(specs, key=lambda spec: (spec.bytes % ALIGNMENT != 0, spec.name))


def _name(spec: TensorSpec) -> str:
    return _BFLOAT16 if spec.dtype.name == "bfloat16" else _NAMES[spec.dtype]


def _header(specs: Sequence[TensorSpec]) -> bytes:
    entries, offset = {}, 0
    for spec in specs:
        place = [offset, offset + spec.bytes]
        entries[spec.name] = {"dtype": _name(spec), "shape": list(spec.shape), "data_offsets": place}
        offset += spec.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_weights(path: Path, specs: Sequence[TensorSpec], pieces: Iterable[tuple[str, np.ndarray]]) -> str:
    """Writes tensors piece by piece, so that no more than a piece is ever in memory.

    Args:
        path: the file to write; must not exist.
        specs: what to write, in any order.
        pieces: names of tensors, each with the next part of its contents. Parts of one tensor follow one another in
            the file; those of several may come in any order.

    Returns:
        The file's sha256.

    Raises:
        OSError: when the disk does not take it.
        ValueError: when the pieces are not what the specs say.
    """
    ordered = _in_file_order(specs)
    header = _header(ordered)
    with path.open("x+b") as file:
        writer = HugePageWriter(file, len(header) + sum(spec.bytes for spec in ordered))
        writer.write(0, header)
        _write_pieces(writer, len(header), ordered, pieces)
        # Only now: what is written in any order can be hashed in one order alone.
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_pieces(
    writer: HugePageWriter, start: int, specs: Sequence[TensorSpec], pieces: Iterable[tuple[str, np.ndarray]]
) -> None:
    begins = dict(
        zip((s.name for s in specs), accumulate((s.bytes for s in specs), initial=start), strict=False)
    )
    by_name, written = {s.name: s for s in specs}, dict.fromkeys(begins, 0)
    for name, piece in pieces:
        spec = by_name.get(name)
        if spec is None:
            raise ValueError(f"{name}: was given to write, and is not among the tensors")
        if piece.dtype != spec.dtype:
            raise ValueError(f"{name}: expected parts of {spec.dtype}, found {piece.dtype}")
        # Before it is written, and not into the next tensor.
        if written[name] + piece.nbytes > spec.bytes:
            raise ValueError(f"{name}: expected {spec.bytes} bytes, found {written[name] + piece.nbytes}")
        writer.write(
            begins[name] + written[name], np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
        )
        written[name] += piece.nbytes
        del piece  # before the next one is made
    for spec in specs:
        if written[spec.name] != spec.bytes:
            raise ValueError(f"{spec.name}: expected {spec.bytes} bytes, found {written[spec.name]}")


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
    for name, _, _, begin, end in entries:
        # Beside an output head of its own, of an embedding only the prompt's rows are read, each somewhere else.
        if end > begin and not (name.startswith(_EMBEDDING) and _HEAD in header):
            advise_huge_pages(mapping, start + begin, start + end)
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
        dtype, shape = _dtype(entry["dtype"]), tuple(entry["shape"])
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
