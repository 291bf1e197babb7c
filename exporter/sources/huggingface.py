"""A Hugging Face directory: config.json, safetensors weights and tokenizer.json."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.weights import aligned_zeros

from .base import Source, SourceTensor
from .end_of_generation import ends_by_text, named_ends, together
from .files import hash_file, read_json, slug, spdx
from .generation import read_generation, without_generation
from .huggingface_templates import chat_templates, template_files
from .huggingface_tokenizer import first, read_tokenizer, special_tokens, token_ids
from .huggingface_tokens import ADDED, CONFIG, TOKENS_MAP

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ADAPTER = "adapter_config.json"
_MODELOPT = "hf_quant_config.json"

# safetensors' names of the types that a float32 holds without loss.
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Masks and tables that old checkpoints carry, in any type; only who asks for their values is refused.
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".self_attn.bias", ".inv_freq", "position_ids")

_ORIGINAL = "export the bfloat16, float16 or float32 checkpoint that it was made from"
_INT4 = f"{_ORIGINAL}, with --weights int4"
# What to do about weights that are quantised already, by `quant_method`; where transformers can undo it, how.
_REMEDIES: Mapping[str, str] = {
    "awq": _INT4,
    "auto-round": _INT4,
    "bitsandbytes": f"{_ORIGINAL}, or load it in transformers and save what model.dequantize() gives",
    "compressed-tensors": f"{_ORIGINAL}, or load it with CompressedTensorsConfig(dequantize=True) and save that",
    "fp8": f"{_ORIGINAL}, or load it with FineGrainedFP8Config(dequantize=True) and save that",
    "gptq": _INT4,
    "mxfp4": f"{_ORIGINAL}, or load it with Mxfp4Config(dequantize=True) and save that",
}
# What gives a method away where config.json is silent: endings of tensors that come with the weights.
_TRACES = (
    (".qweight", "gptq"),  # of AWQ too, for which there is the same to do
    (".weight_packed", "compressed-tensors"),
    (".weight_scale", "compressed-tensors"),
    (".weight_scale_inv", "fp8"),
    (".absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    ("_proj_blocks", "mxfp4"),
)


def open_huggingface(folder: Path, *, name: str | None = None) -> Source:
    """Read a directory as `save_pretrained` writes it.

    Args:
        folder: the directory.
        name: a name for the model; None takes the directory's.

    Raises:
        PrecastError: when something is missing, broken, quantised, of an unsupported type, a pickle, or needs
            code that the checkpoint brings along.
    """
    config = _config(folder)
    shards = _shards(folder)
    tensors = _tensors(folder, shards)
    tokenizer = read_tokenizer(folder)
    generation = read_generation(folder, config)
    special = special_tokens(config, tokenizer)
    templates = chat_templates(folder, tokenizer.tokens.named)
    return Source(
        name=slug(name or folder.resolve().name),
        config=without_generation(config),
        tensors=tensors,
        tokenizer_json=tokenizer.data,
        chat_template=templates.default,
        named_templates=templates.named,
        bos_token=special["bos_token"],
        eos_token=special["eos_token"],
        eos_token_ids=_ends(folder, generation.values, config, tokenizer.document, special["eos_token"]),
        sampling=generation.sampling,
        licence=_licence(folder / "README.md"),
        files=tuple(hash_file(path) for path in _files_read(folder, shards)),
        remarks=(*tokenizer.remarks, *generation.remarks),
    )


def _config(folder: Path) -> dict[str, object]:
    """config.json, unless it asks for something that would change the model behind our back."""
    path = folder / "config.json"
    if (folder / _ADAPTER).is_file():
        raise PrecastError(
            f"{folder}: holds an adapter ({_ADAPTER}), which is only a change to another model; merge it into "
            "that model (merge_and_unload() of peft) and export what save_pretrained writes."
        )
    if not path.is_file():
        found = "an empty directory" if not any(folder.iterdir()) else "a directory without it"
        raise PrecastError(
            f"{folder}: expected config.json, found {found}; name a Hugging Face model directory."
        )
    config = read_json(path)
    _refuse_quantised(folder, config)
    return config


def _refuse_quantised(folder: Path, config: Mapping[str, object]) -> None:
    for key, unsaid in (("quantization_config", "?"), ("compression_config", "compressed-tensors")):
        if config.get(key):
            method = _method(config[key], unsaid)
            raise PrecastError(
                f"{folder / 'config.json'}: {key} says that the weights are quantised already ({method}); "
                f"{_REMEDIES.get(method, _ORIGINAL)}."
            )
    if (folder / _MODELOPT).is_file():
        raise PrecastError(
            f"{folder / _MODELOPT}: says that the weights are quantised already (modelopt); {_ORIGINAL}."
        )


def _method(quantization: object, unsaid: str) -> str:
    """The name of a quantisation method; configs of bitsandbytes have not always said theirs."""
    if not isinstance(quantization, dict):
        return str(quantization)
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        unsaid = "bitsandbytes"
    return str(quantization.get("quant_method") or unsaid)


# --- weights ------------------------------------------------------------------------------------------------


def _shards(folder: Path) -> dict[str, frozenset[str]]:
    """The weight files, each with the tensors that the index, if there is one, expects in it."""
    if (folder / _SINGLE).is_file():
        return {_SINGLE: frozenset()}
    if (folder / _INDEX).is_file():
        return _indexed_shards(folder / _INDEX)
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise PrecastError(
            f"{folder}: has its weights only as a pickle ({pickles[0]}), which can run code when it is read; "
            f"convert them to {_SINGLE} first."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    raise PrecastError(
        f"{folder}: expected weights in {_SINGLE} or {_INDEX}, found "
        f"{f'only {others[0]}' if others else 'neither'}; fetch the files again."
    )


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
        if not (path.parent / shard).is_file():
            raise PrecastError(
                f"{path}: names the shard {shard}, which is not there; fetch the missing file."
            )
    return dict(sorted(shards.items()))


def _tensors(folder: Path, shards: Mapping[str, frozenset[str]]) -> dict[str, SourceTensor]:
    """Every tensor of every shard; like transformers, also those that the index does not mention."""
    tensors: dict[str, SourceTensor] = {}
    for shard, expected in shards.items():
        found = _read_header(folder / shard)
        if missing := sorted(expected - found.keys()):
            raise PrecastError(
                f"{folder / shard}: lacks {missing[0]}, which {_INDEX} expects in it; fetch both files again."
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
    """The method by which a file's weights seem to be quantised, or None."""
    found = {method for ending, method in _TRACES for name in names if name.endswith(ending)}
    fallback = "fp8" if dtype.startswith("F8_") else None
    return next((method for _, method in _TRACES if method in found), fallback)


def _refuse_dtype(path: Path, name: str, dtype: str, method: str | None) -> NoReturn:
    seems = "gptq or awq" if method == "gptq" else method
    remedy = (
        "convert the checkpoint to one of these first"
        if method is None
        else f"the weights seem to be quantised already ({seems}): {_REMEDIES[method]}"
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
    """The mapped shard; safetensors checks on opening that header and file length agree."""
    import ml_dtypes  # noqa: F401 - teaches numpy the name "bfloat16"
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise PrecastError(
            f"{path}: is not a whole safetensors file ({error}) and may be truncated; fetch the file again."
        ) from error


# --- ends, licence ------------------------------------------------------------------------------------------


def _ends(
    folder: Path,
    generation: Mapping[str, object],
    config: Mapping[str, object],
    tokenizer: Mapping[str, Any],
    eos_token: str | None,
) -> tuple[int, ...]:
    """Where generation stops: at what generation_config.json, config.json and the tokenizer name, and by text."""
    tokens = token_ids(tokenizer)
    special = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    named = (*named_ends(folder, generation), *named_ends(folder, config))
    own = () if eos_token is None else (tokens.get(eos_token),)
    vocab = config.get("vocab_size")
    by_text = ends_by_text(special, tokens)
    # A token that the model does not embed never comes.
    return together((*named, *own), (i for i in by_text if not isinstance(vocab, int) or i < vocab))


def _licence(card: Path) -> str | None:
    """The `license` of a model card's front matter; a licence of its own goes by its `license_name`."""
    import yaml  # type: ignore[import-untyped]

    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        match = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        front = yaml.safe_load(match[1]) if match else None
    except OSError as error:
        raise PrecastError(f"{card}: cannot be read ({error.strerror}); check its permissions.") from error
    except Exception:
        # The card is prose for people, of which only what is said plainly is taken; and PyYAML raises whatever
        # Python says to a value, as ValueError to a date that is none.
        return None
    if not isinstance(front, dict):
        return None
    licence = first(front.get("license"))
    return spdx(front.get("license_name") or licence if licence == "other" else licence)


# --- files --------------------------------------------------------------------------------------------------


def _files_read(folder: Path, shards: Mapping[str, object]) -> list[Path]:
    """What this reader looks at, in a fixed order."""
    names = [
        "config.json",
        *([_INDEX] if _SINGLE not in shards else []),
        *shards,
        "tokenizer.json",
        CONFIG,
        TOKENS_MAP,
        ADDED,
        "generation_config.json",
        "README.md",
    ]
    return [*(folder / name for name in names if (folder / name).is_file()), *template_files(folder)]
