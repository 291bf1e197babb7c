"""A Hugging Face directory: config.json, safetensors weights and tokenizer.json."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest import SAMPLING_KEYS

from .base import Source, SourceTensor
from .files import hash_file, read_json, read_text, slug, spdx

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# safetensors' names of the types that a float32 holds without loss.
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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
    tokenizer = _tokenizer(folder)
    generation = _optional_json(folder / "generation_config.json")
    special = _special_tokens(folder, config, tokenizer)
    return Source(
        name=slug(name or folder.resolve().name),
        config=config,
        tensors=tensors,
        tokenizer_json=(folder / "tokenizer.json").read_bytes(),
        chat_template=_chat_template(folder),
        bos_token=special["bos_token"],
        eos_token=special["eos_token"],
        eos_token_ids=_eos_token_ids(folder, generation, config, tokenizer, special["eos_token"]),
        sampling=_sampling(folder, generation),
        licence=_licence(folder / "README.md"),
        files=tuple(hash_file(path) for path in _files_read(folder, shards)),
    )


def _config(folder: Path) -> dict[str, object]:
    """config.json, unless it asks for something that would change the model behind our back."""
    path = folder / "config.json"
    if not path.is_file():
        found = "an empty directory" if not any(folder.iterdir()) else "a directory without it"
        raise PrecastError(
            f"{folder}: expected config.json, found {found}; name a Hugging Face model directory."
        )
    config = read_json(path)
    if "auto_map" in config:
        raise PrecastError(
            f"{path}: auto_map asks for Python code that came with the checkpoint, which is never run; use a "
            "checkpoint of an architecture that transformers itself has."
        )
    if config.get("quantization_config"):
        quantization: Any = config["quantization_config"]
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else quantization
        raise PrecastError(
            f"{path}: quantization_config says that the weights are quantised already ({method}); use the "
            "checkpoint in bfloat16, float16 or float32, which the export quantises itself."
        )
    return config


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
    raise PrecastError(
        f"{folder}: expected weights in {_SINGLE} or {_INDEX}, found neither; fetch the files again."
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
        for name in shard.keys():  # noqa: SIM118 - a shard is no mapping
            part = shard.get_slice(name)
            dtype = part.get_dtype()
            if dtype not in _DTYPES:
                raise PrecastError(
                    f"{path}: {name} is stored as {dtype}, and only F32, F16 and BF16 are read; convert the "
                    "checkpoint to one of these first."
                )
            tensors[name] = SourceTensor(
                shape=tuple(part.get_shape()), dtype=_DTYPES[dtype], read=partial(_read_tensor, path, name)
            )
    return tensors


def _read_tensor(path: Path, name: str) -> np.ndarray:
    with _open_shard(path) as shard:
        tensor: np.ndarray = shard.get_tensor(name)
    return tensor.astype(np.float32, copy=False)


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


# --- tokenizer, template, defaults --------------------------------------------------------------------------


def _tokenizer(folder: Path) -> dict[str, object]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise PrecastError(
            f"{folder}: expected tokenizer.json, found none; save the tokenizer in its fast form "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))."
        )
    document = read_json(path)
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower one
        raise PrecastError(
            f"{path}: is not a tokenizer that the tokenizers library reads ({error}); save it again, or "
            "update the library."
        ) from error
    return document


def _special_tokens(
    folder: Path, config: Mapping[str, object], tokenizer: Mapping[str, object]
) -> dict[str, str | None]:
    """Text of bos and eos: as the tokenizer's files say, else by the ids in config.json."""
    paths = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
    said = {key: value for path in reversed(paths) for key, value in _optional_json(path).items()}
    if not any(path.is_file() for path in paths):
        texts: dict[Any, str] = {token_id: text for text, token_id in _token_ids(tokenizer).items()}
        said = {key: texts.get(_first(config.get(f"{key}_id"))) for key in ("bos_token", "eos_token")}
    return {key: _text(folder, key, said.get(key)) for key in ("bos_token", "eos_token")}


def _text(folder: Path, key: str, token: object) -> str | None:
    """A special token is written as its text, or as an object with its text in `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise PrecastError(
            f"{folder / 'tokenizer_config.json'}: expected {key} to be text, found {token!r}; correct it."
        )
    return content


def _token_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json with its id; added tokens go before the model's own."""
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram models list [token, score]
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}


def _first(value: object) -> object:
    return value[0] if isinstance(value, list) and value else value


def _eos_token_ids(
    folder: Path,
    generation: Mapping[str, object],
    config: Mapping[str, object],
    tokenizer: Mapping[str, object],
    eos_token: str | None,
) -> tuple[int, ...]:
    """Where generation stops: generation_config.json's word, else config.json's, else the tokenizer's."""
    by_text = _token_ids(tokenizer).get(eos_token) if eos_token is not None else None
    for said in (generation.get("eos_token_id"), config.get("eos_token_id"), by_text):
        if said is None:
            continue
        ids = said if isinstance(said, list) else [said]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise PrecastError(
                f"{folder}: expected eos_token_id to be token ids, found {said!r}; correct the config."
            )
        return tuple(dict.fromkeys(ids))
    return ()


def _chat_template(folder: Path) -> str | None:
    """chat_template.jinja, the newer place, else what tokenizer_config.json has or calls "default"."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    template = _optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named:
            raise PrecastError(
                f"{folder / 'tokenizer_config.json'}: expected a chat template named default, found "
                f"{', '.join(map(str, named)) or 'none'}; write the wanted one to chat_template.jinja."
            )
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise PrecastError(
            f"{folder / 'tokenizer_config.json'}: expected chat_template to be text, found "
            f"{type(template).__name__}; write the template to chat_template.jinja."
        )
    return template


def _sampling(folder: Path, generation: Mapping[str, object]) -> dict[str, float | int]:
    """The sampling defaults, if generation_config.json turns sampling on."""
    do_sample = generation.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise PrecastError(
            f"{folder / 'generation_config.json'}: expected do_sample to be true or false, found "
            f"{json.dumps(do_sample):.80}; correct it."
        )
    if not do_sample:
        return {}
    said = {key: generation[key] for key in SAMPLING_KEYS if generation.get(key) is not None}
    for key, value in said.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise PrecastError(
                f"{folder / 'generation_config.json'}: expected {key} to be a number, found "
                f"{json.dumps(value):.80}; correct it."
            )
    # transformers samples at temperature 1 where none is given; the loader would be greedy.
    return {"temperature": 1.0, **said}  # type: ignore[dict-item]  # the loop above has looked


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
    licence = _first(front.get("license"))
    return spdx(front.get("license_name") or licence if licence == "other" else licence)


# --- files --------------------------------------------------------------------------------------------------


def _optional_json(path: Path) -> dict[str, object]:
    return read_json(path) if path.is_file() else {}


def _files_read(folder: Path, shards: Mapping[str, object]) -> list[Path]:
    """What this reader looks at, in a fixed order."""
    names = [
        "config.json",
        *([_INDEX] if _SINGLE not in shards else []),
        *shards,
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
    ]
    return [folder / name for name in names if (folder / name).is_file()]
