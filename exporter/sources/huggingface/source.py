"""A Hugging Face directory: config.json, safetensors weights and tokenizer.json."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from precast.loaders.artifact.errors import PrecastError

from ..base import Source
from ..end_of_generation import ends_by_text, named_ends, together
from ..files import hash_file, plain_file, read_json, slug, spdx
from ..generation import read_generation, without_generation
from .templates import chat_templates, template_files
from .tokenizer import first, read_tokenizer, special_tokens, token_ids
from .tokens import ADDED, CONFIG, TOKENS_MAP
from .weights import INDEX, ORIGINAL, REMEDIES, SINGLE, find_shards, read_tensors

_ADAPTER = "adapter_config.json"
_MODELOPT = "hf_quant_config.json"


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
    shards = find_shards(folder)
    tensors = read_tensors(folder, shards)
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
    if plain_file(folder / _ADAPTER):
        raise PrecastError(
            f"{folder}: holds an adapter ({_ADAPTER}), which is only a change to another model; merge it into "
            "that model (merge_and_unload() of peft) and export what save_pretrained writes."
        )
    if not plain_file(path):
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
                f"{REMEDIES.get(method, ORIGINAL)}."
            )
    if plain_file(folder / _MODELOPT):
        raise PrecastError(
            f"{folder / _MODELOPT}: says that the weights are quantised already (modelopt); {ORIGINAL}."
        )


def _method(quantization: object, unsaid: str) -> str:
    """The name of a quantisation method; configs of bitsandbytes have not always said theirs."""
    if not isinstance(quantization, dict):
        return str(quantization)
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        unsaid = "bitsandbytes"
    return str(quantization.get("quant_method") or unsaid)


# --- ends, licence ------------------------------------------------------------------------------------------


def _ends(
    folder: Path,
    generation: Mapping[str, object],
    config: Mapping[str, object],
    tokenizer: Mapping[str, Any],
    eos_token: str | None,
) -> tuple[int, ...]:
    """Return the end tokens named by generation_config.json, config.json and the tokenizer, and those found by text."""
    tokens = token_ids(tokenizer)
    special = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    named = (*named_ends(folder, generation), *named_ends(folder, config))
    own = () if eos_token is None else (tokens.get(eos_token),)
    vocab = config.get("vocab_size")
    by_text = ends_by_text(special, tokens)
    # The model never generates a token without an embedding.
    return together((*named, *own), (i for i in by_text if not isinstance(vocab, int) or i < vocab))


def _licence(card: Path) -> str | None:
    """The `license` of a model card's front matter; a licence of its own goes by its `license_name`."""
    import yaml  # type: ignore[import-untyped]

    if not plain_file(card):
        return None
    try:
        text = card.read_text(encoding="utf-8")
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
        *([INDEX] if SINGLE not in shards else []),
        *shards,
        "tokenizer.json",
        CONFIG,
        TOKENS_MAP,
        ADDED,
        "generation_config.json",
        "README.md",
    ]
    return [*(folder / name for name in names if (folder / name).is_file()), *template_files(folder)]
