"""The weights of a Hugging Face directory: safetensors, in one file or in shards."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.weights import aligned_zeros

from ..base import SourceTensor
from ..files import plain_file, read_json, refuse_stand_in

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Other forms of weight files: a pattern of the name, a description and the remedy.
_OTHERS = (
    (
        r"model\.safetensors\.index\..+\.json",
        "only the variant {name}; rename it to {index}, and leave its shards as they are called",
    ),
    (r"model\.[^-]+\.safetensors", "only the variant {name}; rename it to {single}"),
    (r"model.*-\d+-of-\d+\.safetensors", "only {name}, a shard without its index; fetch {index} too"),
    (
        r"consolidated.*\.safetensors",
        (
            "only {name}, which has the names of its maker's own code; fetch the files called model*.safetensors,"
            " or convert it with the script that transformers has for this architecture"
        ),
    ),
    (
        r"adapter_model\.safetensors",
        (
            "only an adapter ({name}); merge it into its model (merge_and_unload() of peft) and export what"
            " save_pretrained writes"
        ),
    ),
    (r".+\.safetensors", "only {name}; rename it to {single} if it holds the whole model"),
    (r".+\.gguf", "only {name}; name that file itself, {folder}/{name}"),
    (
        r".+\.(bin|pt|pth|ckpt)",
        (
            "them only as a pickle ({name}), which can run code when it is read; convert them to {single} first, by"
            " from_pretrained and save_pretrained of transformers"
        ),
    ),
    (
        r".+\.(h5|msgpack)",
        (
            "only {name} of another framework; load it in transformers 4 (from_tf=True or from_flax=True) and save it"
            " with save_pretrained"
        ),
    ),
)

# safetensors' names for the types that float32 represents exactly.
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Masks and tables in old checkpoints. They may have any type; only reading their values is refused.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".self_attn.bias", ".inv_freq", "position_ids")

ORIGINAL = "export the bfloat16, float16 or float32 checkpoint that it was made from"
_INT4 = f"{ORIGINAL}, with --weights int4"
# Remedies for weights that are already quantised, by `quant_method`.
REMEDIES: Mapping[str, str] = {
    "awq": _INT4,
    "auto-round": _INT4,
    "bitsandbytes": f"{ORIGINAL}, or load it in transformers and save what model.dequantize() gives",
    "compressed-tensors": f"{ORIGINAL}, or load it with CompressedTensorsConfig(dequantize=True) and save that",
    "fp8": f"{ORIGINAL}, or load it with FineGrainedFP8Config(dequantize=True) and save that",
    "gptq": _INT4,
    "mxfp4": f"{ORIGINAL}, or load it with Mxfp4Config(dequantize=True) and save that",
}
# Suffixes of tensor names that reveal a method if config.json does not name it.
_TRACES = (
    (".qweight", "gptq"),  # AWQ uses it too, with the same remedy
    (".weight_packed", "compressed-tensors"),
    (".weight_scale", "compressed-tensors"),
    (".weight_scale_inv", "fp8"),
    (".absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    ("_proj_blocks", "mxfp4"),
)


def find_shards(folder: Path) -> dict[str, frozenset[str]]:
    """Return the weight files, each with the tensors that the index, if any, expects in it."""
    if plain_file(folder / SINGLE):
        return {SINGLE: frozenset()}
    if plain_file(folder / INDEX):
        return _indexed_shards(folder / INDEX)
    raise PrecastError(f"{folder}: expected weights in {SINGLE} or {INDEX}, found {_found(folder)}.")


def _found(folder: Path) -> str:
    """Return the first match of `_OTHERS`, with its remedy."""
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
                f"{path}: names a shard outside its own directory ({shard}); fetch the file again."
            )
    if missing := [shard for shard in sorted(shards) if not plain_file(path.parent / shard)]:
        more = f" (nor are {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise PrecastError(
            f"{path}: names the shard {missing[0]}, which is not there{more}; the download may have stopped"
            f" early: fetch the missing file{'s' if more else ''}."
        )
    return dict(sorted(shards.items()))


def read_tensors(folder: Path, shards: Mapping[str, frozenset[str]]) -> dict[str, SourceTensor]:
    """Return every tensor of every shard; like transformers, include those missing from the index."""
    tensors: dict[str, SourceTensor] = {}
    for shard, expected in shards.items():
        found = _read_header(folder / shard)
        if missing := sorted(expected - found.keys()):
            raise PrecastError(
                f"{folder / shard}: lacks {missing[0]}, which {INDEX} expects in it; fetch both files again."
            )
        if twice := sorted(tensors.keys() & found.keys()):
            raise PrecastError(
                f"{folder / shard}: holds {twice[0]}, which an earlier shard holds too; keep one of them."
            )
        tensors |= found
    return tensors


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
                if not name.endswith(_BUFFERS):
                    read()
            tensors[name] = SourceTensor(
                shape=tuple(part.get_shape()), dtype=_DTYPES.get(dtype, dtype), read=read
            )
    return tensors


def _trace(names: Iterable[str], dtype: str) -> str | None:
    """Return the method that seems to have quantised a file's weights, or None."""
    found = {method for ending, method in _TRACES for name in names if name.endswith(ending)}
    fallback = "fp8" if dtype.startswith("F8_") else None
    return next((method for _, method in _TRACES if method in found), fallback)


def _refuse_dtype(path: Path, name: str, dtype: str, method: str | None) -> NoReturn:
    seems = "gptq or awq" if method == "gptq" else method
    remedy = (
        "convert the checkpoint to one of these first"
        if method is None
        else f"the weights seem to be quantised already ({seems}): {REMEDIES[method]}"
    )
    raise PrecastError(f"{path}: {name} is stored as {dtype}, and only F32, F16 and BF16 are read; {remedy}.")


def _read_tensor(path: Path, name: str) -> np.ndarray:
    with _open_shard(path) as shard:
        tensor: np.ndarray = shard.get_tensor(name)
    floats = aligned_zeros(tensor.shape, np.dtype(np.float32))
    floats[...] = tensor
    return floats


@contextmanager
def _open_shard(path: Path) -> Iterator[Any]:
    """Map a shard; safetensors checks that header and file length agree."""
    import ml_dtypes  # noqa: F401 - teaches numpy the name "bfloat16"
    from safetensors import SafetensorError, safe_open

    refuse_stand_in(path)
    try:
        with safe_open(path, framework="numpy") as shard:
            yield shard
    except (SafetensorError, OSError, UnicodeError) as error:
        raise PrecastError(
            f"{path}: is not a whole safetensors file ({error}) and may be truncated; fetch the file again."
        ) from error
