"""``weights.safetensors``: one copy of the weights, memory-mapped and passed to XLA without a copy.

The file is a valid safetensors file. It begins with the header's length in 8 bytes, little-endian, followed by a JSON
header and the data. Two rules go beyond that format. The header is padded with spaces so that the data starts on a
64-byte boundary. Tensors whose size is not a multiple of 64 bytes come last, so that all tensors before them start on a
64-byte boundary. XLA's CPU client uses an array zero-copy only if the array is aligned to 64 bytes.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .errors import PrecastError
from .frozen import Frozen
from .json_records import parse_json
from .pages import HugePageWriter, advise_huge_pages

ALIGNMENT = 64
# The maximum size of a header in the safetensors library, in bytes.
_MAX_HEADER = 100 << 20
# The maximum number of axes in NumPy.
_MAX_AXES = 64
_EMBEDDING, _HEAD = "model.embed_tokens.", "lm_head.weight"
_METADATA = "__metadata__"
_REMEDY = "copy or export the artifact again"
_BFLOAT16 = "BF16"  # not in `_DTYPES`, because NumPy has no such dtype
_DTYPES: Mapping[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorSpec(Frozen):
    """Name, shape and dtype of a tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array of zeros that XLA's CPU client can use zero-copy, because it is aligned to 64 bytes."""
    size = prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def numpy_dtype(name: str) -> np.dtype:
    """Return the dtype for a name in a manifest. The name is a key of `DTYPE_BYTES`."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes  # a lazy import, only for bfloat16, which NumPy lacks

    dtype: np.dtype = np.dtype(ml_dtypes.bfloat16)
    return dtype


def _dtype(name: str) -> np.dtype:
    """Return the dtype for a name in a safetensors header."""
    return numpy_dtype("bfloat16") if name == _BFLOAT16 else _DTYPES[name]


def _in_file_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    return sorted(specs, key=lambda spec: (spec.bytes % ALIGNMENT != 0, spec.name))


def _name(spec: TensorSpec) -> str:
    return _BFLOAT16 if spec.dtype.name == "bfloat16" else _NAMES[spec.dtype]


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    entries: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        place = [offset, offset + spec.bytes]
        entries[spec.name] = {"dtype": _name(spec), "shape": list(spec.shape), "data_offsets": place}
        offset += spec.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_weights(path: Path, specs: Sequence[TensorSpec], pieces: Iterable[tuple[str, np.ndarray]]) -> str:
    """Write tensors piece by piece, with one piece in memory at a time.

    Args:
        path: the file to create; it must not exist.
        specs: the tensors, in any order.
        pieces: pairs of a tensor's name and the next part of its contents. Parts of one tensor come in order; parts of
            different tensors may be interleaved.

    Returns:
        The file's sha256, in hex.

    Raises:
        OSError: writing fails.
        ValueError: the pieces do not match the specs.
    """
    ordered = _in_file_order(specs)
    header = _header(ordered)
    with path.open("x+b") as file:
        writer = HugePageWriter(file, len(header) + sum(spec.bytes for spec in ordered))
        writer.write(0, header)
        _write_pieces(writer, len(header), ordered, pieces)
        # Hash at the end, because the pieces may arrive out of order.
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
            raise ValueError(f"{name}: expected one of the specified tensors, found a piece of another")
        if piece.dtype != spec.dtype:
            raise ValueError(f"{name}: expected parts of {spec.dtype}, found {piece.dtype}")
        # Check before writing, so that an overlong piece does not overwrite the next tensor.
        if written[name] + piece.nbytes > spec.bytes:
            raise ValueError(f"{name}: expected {spec.bytes} bytes, found {written[name] + piece.nbytes}")
        writer.write(
            begins[name] + written[name], np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
        )
        written[name] += piece.nbytes
        del piece  # frees the piece's memory before the generator creates the next piece
    for spec in specs:
        if written[spec.name] != spec.bytes:
            raise ValueError(f"{spec.name}: expected {spec.bytes} bytes, found {written[spec.name]}")


def file_parts(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """Return the contents of a safetensors file for arrays in memory, as a list of parts.

    Args:
        arrays: the tensors, by name.
        metadata: strings for the file's header, by name.
    """
    specs = [TensorSpec(name=name, shape=array.shape, dtype=array.dtype) for name, array in arrays.items()]
    ordered = _in_file_order(specs)
    contents = (np.ascontiguousarray(arrays[spec.name]).reshape(-1).view(np.uint8).data for spec in ordered)
    return [_header(ordered, metadata), *contents]


def read_metadata(source: BinaryIO) -> dict[str, str]:
    """Return the metadata of a safetensors file that is open at its start, and seek back to the start.

    Raises:
        PrecastError: the file is not a safetensors file, or its metadata are not strings.
    """
    header, _ = _read_header(source)
    source.seek(0)
    metadata = header.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise PrecastError(
            f"{source.name}: expected strings as the header's metadata, found something else; {_REMEDY}."
        )
    return metadata


def _read_header(source: BinaryIO) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file that is open at its start; return the header and the data's offset."""
    path, size = Path(source.name), os.fstat(source.fileno()).st_size
    length = int.from_bytes(source.read(8), "little")
    if size < 8 or length > min(_MAX_HEADER, size - 8):
        raise PrecastError(f"{path}: expected a safetensors file, found no valid header length; {_REMEDY}.")
    header = parse_json(source.read(length), str(path))
    if not isinstance(header, dict):
        raise PrecastError(f"{path}: expected a safetensors header, found {header!r:.60}; {_REMEDY}.")
    return header, 8 + length


def map_weights(source: Path | BinaryIO) -> dict[str, np.ndarray]:
    """Map a file that `write_weights` has written. The system reads each page from disk on first access.

    Args:
        source: the file's path, or the checked file, open at its start.

    Returns:
        Arrays by tensor name. They are views of a private mapping, which lives as long as the arrays.

    Raises:
        PrecastError: the file is not a safetensors file, or its header does not describe its data exactly.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            return map_weights(file)
    path = Path(source.name)
    header, start = _read_header(source)
    # NumPy exports only writable arrays through DLPack, so the mapping is private and writable (copy-on-write).
    # Nothing writes to the mapping, so no page is ever copied.
    mapping = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_COPY)
    entries = [_entry(path, name, e) for name, e in header.items() if name != _METADATA]
    _check_cover(path, entries, len(mapping) - start)
    for name, _, _, begin, end in entries:
        # A model with a separate output head reads only the rows of its embedding that belong to the prompt's tokens.
        # These rows are scattered, so huge pages would read far more than is used.
        if end > begin and not (name.startswith(_EMBEDDING) and _HEAD in header):
            advise_huge_pages(mapping, start + begin, start + end)
    return {
        name: np.frombuffer(mapping, dtype, prod(shape), start + begin).reshape(shape)
        for name, dtype, shape, begin, _ in entries
    }


_Entry = tuple[str, np.dtype, tuple[int, ...], int, int]


def _entry(path: Path, name: str, entry: object) -> _Entry:
    """Parse the entry of a tensor in an untrusted header; check that its size matches its shape and dtype."""
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
            f"{path}: the header's entry for tensor {name!r} is invalid ({entry!r:.80}); {_REMEDY}."
        ) from None
    return name, dtype, shape, begin, end


def _check_cover(path: Path, entries: Sequence[_Entry], size: int) -> None:
    """Check that the tensors cover the data to the end of the file without gaps or overlaps."""
    at = 0
    for name, _, _, begin, end in sorted(entries, key=lambda e: (e[3], e[4])):
        if begin != at:
            raise PrecastError(
                f"{path}: tensor {name!r} begins at byte {begin} of the data, expected {at}; {_REMEDY}."
            )
        at = end
    if at != size:
        raise PrecastError(
            f"{path}: the tensors cover {at} bytes of data, but the file contains {size}; {_REMEDY}."
        )
