"""Read the weights of a Hugging Face directory: safetensors, in one file or in shards."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import ml_dtypes
import numpy as np

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.weights import aligned_zeros

from ..base import SourceTensor
from ..files import plain_file, read_json, refuse_stand_in
from .parts import BUFFERS, ORIGINAL, RawTensor
from .quantisation import Quantisation
from .quantised import dequantised

T = TypeVar("T")

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Files that precast does not read as weights: a pattern of the name, and a description with the remedy.
_OTHERS = (
    (
        r"model\.safetensors\.index\..+\.json",
        "only the variant {name}; rename it to {index}, and keep the names of its shards",
    ),
    (r"model\.[^-]+\.safetensors", "only the variant {name}; rename it to {single}"),
    (r"model.*-\d+-of-\d+\.safetensors", "only {name}, a shard without its index; fetch {index} too"),
    (
        r"consolidated.*\.safetensors",
        (
            "only {name}, whose tensors have the publisher's own names; fetch the files model*.safetensors, or convert"
            " it with transformers' script for this architecture"
        ),
    ),
    (
        r"adapter_model\.safetensors",
        (
            "only an adapter ({name}); merge it into its model (peft's merge_and_unload()) and export the result of"
            " save_pretrained"
        ),
    ),
    (r".+\.safetensors", "only {name}; rename it to {single} if it contains the whole model"),
    (r".+\.gguf", "only {name}; export that file itself, {folder}/{name}"),
    (
        r".+\.(bin|pt|pth|ckpt)",
        (
            "only a pickle ({name}), which can run code when it is loaded; convert it to {single} first, with"
            " transformers' from_pretrained and save_pretrained"
        ),
    ),
    (
        r".+\.(h5|msgpack)",
        (
            "only {name}, from another framework; load it with transformers 4 (from_tf=True or from_flax=True) and save"
            " it with save_pretrained"
        ),
    ),
)

_FLOAT8 = "F8_E4M3"
# safetensors' names for the types whose values float32 represents exactly.
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

_INT4 = f"{ORIGINAL}, with --weights int4"
# Remedies for weights that are already quantised, by `quant_method`.
REMEDIES: Mapping[str, str] = {
    "awq": _INT4,
    "auto-round": _INT4,
    "bitsandbytes": f"{ORIGINAL}, or load it in transformers and save the result of model.dequantize()",
    "compressed-tensors": f"{ORIGINAL}, or load it with CompressedTensorsConfig(dequantize=True) and save it",
    "fp8": f"{ORIGINAL}, or load it with FineGrainedFP8Config(dequantize=True) and save it",
    "gptq": _INT4,
    "mxfp4": f"{ORIGINAL}, or load it with Mxfp4Config(dequantize=True) and save it",
}
# Endings of tensor names, each with the quantisation method that uses it, for checkpoints whose config names no method.
_TRACES = (
    (".qweight", "gptq"),  # AWQ uses the same ending, and has the same remedy
    (".weight_packed", "compressed-tensors"),
    (".weight_scale", "compressed-tensors"),
    (".weight_scale_inv", "fp8"),
    (".absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    ("_proj_blocks", "mxfp4"),
)


def find_shards(folder: Path) -> dict[str, frozenset[str]]:
    """Return the weight files, each with the names of its tensors in the index; without an index, there are no names.

    Raises:
        PrecastError: there are no weight files, or the index is broken or lists a missing file.
    """
    if plain_file(folder / SINGLE):
        return {SINGLE: frozenset()}
    if plain_file(folder / INDEX):
        return _indexed_shards(folder / INDEX)
    raise PrecastError(f"{folder}: expected weights in {SINGLE} or {INDEX}, found {_found(folder)}.")


def _found(folder: Path) -> str:
    """Describe the first file that matches `_OTHERS`, with the remedy."""
    names = sorted(path.name for path in folder.iterdir())
    for pattern, remedy in _OTHERS:
        if (name := next((name for name in names if re.fullmatch(pattern, name)), None)) is not None:
            return remedy.format(name=name, folder=folder, single=SINGLE, index=INDEX)
    return "neither; fetch the files again"


def _indexed_shards(path: Path) -> dict[str, frozenset[str]]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise PrecastError(
            f"{path}: expected a weight_map from tensors to files, found none; fetch the file again."
        )
    shards = {
        shard: frozenset(t for t, s in weight_map.items() if s == shard) for shard in weight_map.values()
    }
    for shard in sorted(shards):
        if Path(shard).name != shard:
            raise PrecastError(
                f"{path}: lists a shard outside its own directory ({shard}); fetch the file again."
            )
    if missing := [shard for shard in sorted(shards) if not plain_file(path.parent / shard)]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PrecastError(
            f"{path}: lists the shard {missing[0]}{more}, but {'these files are' if more else 'this file is'} missing;"
            f" fetch {'them' if more else 'it'}."
        )
    return dict(sorted(shards.items()))


def read_tensors(
    folder: Path, shards: Mapping[str, frozenset[str]], quantisation: Quantisation | None = None
) -> dict[str, SourceTensor]:
    """Return every tensor of every shard, including tensors missing from the index, as transformers does.

    Args:
        folder: the folder of the shards.
        shards: the result of `find_shards`.
        quantisation: the quantisation of the weights; None for floats.

    Raises:
        PrecastError: a shard is broken or lacks a tensor, or a tensor is repeated or has an unsupported type.
    """
    if quantisation is not None:
        return dequantised(_merged(folder, shards, _read_raw_header), quantisation)
    return _merged(folder, shards, _read_header)


def _merged(
    folder: Path, shards: Mapping[str, frozenset[str]], read_header: Callable[[Path], dict[str, T]]
) -> dict[str, T]:
    tensors: dict[str, T] = {}
    for shard, expected in shards.items():
        found = read_header(folder / shard)
        if missing := sorted(expected - found.keys()):
            raise PrecastError(
                f"{folder / shard}: lacks the tensor {missing[0]}, which {INDEX} places in it; fetch both files again."
            )
        if repeated := sorted(tensors.keys() & found.keys()):
            raise PrecastError(
                f"{folder / shard}: contains the tensor {repeated[0]}, as does an earlier shard; keep one of the two."
            )
        tensors |= found
    return tensors


def _read_raw_header(path: Path) -> dict[str, RawTensor]:
    with _open_shard(path) as shard:
        parts = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 - safe_open is no mapping
        return {
            name: RawTensor(
                where=str(path),
                shape=tuple(part.get_shape()),
                dtype=part.get_dtype(),
                read=partial(_read_raw, path, name, part.get_dtype(), tuple(part.get_shape())),
            )
            for name, part in parts.items()
        }


def _read_raw(path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    if dtype != _FLOAT8:
        with _open_shard(path) as shard:
            tensor: np.ndarray = shard.get_tensor(name)
        return tensor
    # NumPy has no 8-bit floats, so safetensors cannot return such a tensor.
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(length))[name]["data_offsets"]
        file.seek(8 + length + begin)
        return np.frombuffer(file.read(end - begin), ml_dtypes.float8_e4m3fn).reshape(shape)


def _read_header(path: Path) -> dict[str, SourceTensor]:
    tensors = {}
    with _open_shard(path) as shard:
        names = list(shard.keys())
        for name in names:
            part = shard.get_slice(name)
            dtype = part.get_dtype()
            read: Callable[[], np.ndarray] = partial(_read_tensor, path, name)
            if dtype not in _DTYPES:
                read = partial(_refuse_dtype, path, name, dtype, _trace(names, dtype))
                if not name.endswith(BUFFERS):
                    read()
            tensors[name] = SourceTensor(
                shape=tuple(part.get_shape()), dtype=_DTYPES.get(dtype, dtype), read=read
            )
    return tensors


def _trace(names: Iterable[str], dtype: str) -> str | None:
    """Return the quantisation method that the tensors' names, or else `dtype`, suggest; None if neither does so."""
    found = {method for ending, method in _TRACES for name in names if name.endswith(ending)}
    fallback = "fp8" if dtype.startswith("F8_") else None
    return next((method for _, method in _TRACES if method in found), fallback)


def _refuse_dtype(path: Path, name: str, dtype: str, method: str | None) -> NoReturn:
    likely = "gptq or awq" if method == "gptq" else method
    remedy = (
        "convert the checkpoint to one of these first"
        if method is None
        else f"the weights seem to be already quantised ({likely}): {REMEDIES[method]}"
    )
    raise PrecastError(f"{path}: expected {name} to be F32, F16 or BF16, found {dtype}; {remedy}.")


def _read_tensor(path: Path, name: str) -> np.ndarray:
    with _open_shard(path) as shard:
        tensor: np.ndarray = shard.get_tensor(name)
    floats = aligned_zeros(tensor.shape, np.dtype(np.float32))
    floats[...] = tensor
    return floats


@contextmanager
def _open_shard(path: Path) -> Iterator[Any]:
    """Yield the open shard, after safetensors has checked that the header agrees with the length of the file.

    Raises:
        PrecastError: the file is not a complete safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    refuse_stand_in(path)
    try:
        with safe_open(path, framework="numpy") as shard:
            yield shard
    except (SafetensorError, OSError, UnicodeError) as error:
        raise PrecastError(
            f"{path}: is not a complete safetensors file ({error}) and may be truncated; fetch the file again."
        ) from error
