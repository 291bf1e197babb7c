"""Read a Hugging Face directory: config.json, safetensors weights and tokenizer.json."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from precast.loaders.artifact.errors import PrecastError

from ..base import Source
from ..end_of_generation import end_tokens_by_text, merge_end_tokens, named_end_tokens
from ..files import hash_file, plain_file, read_json, slug, spdx
from ..generation import read_generation, without_generation
from .parts import ORIGINAL
from .quantisation import Quantisation, quantisation_of
from .templates import chat_templates, template_files
from .tokenizer import first, read_tokenizer, special_tokens, token_ids
from .tokens import ADDED, CONFIG, TOKENS_MAP
from .weights import INDEX, REMEDIES, SINGLE, find_shards, read_tensors

_ADAPTER = "adapter_config.json"
_MODELOPT = "hf_quant_config.json"
# Keys of config.json that describe a quantisation, each with the method that is assumed if the value names none.
_QUANTISATION = {"quantization_config": "?", "compression_config": "compressed-tensors"}


def open_huggingface(folder: Path, *, name: str | None = None) -> Source:
    """Return the model of a directory in the layout of transformers' `save_pretrained`.

    Args:
        folder: the directory.
        name: name of the model; None means the directory's name.

    Raises:
        PrecastError: a file is missing or broken; the weights are a pickle, quantised in an unsupported way, or of an
            unsupported type; or the tokenizer needs the checkpoint's own code.
    """
    config = _read_config(folder)
    quantisation = _quantisation(folder, config)
    shards = find_shards(folder)
    tensors = read_tensors(folder, shards, quantisation)
    tokenizer = read_tokenizer(folder)
    generation = read_generation(folder, config)
    special = special_tokens(config, tokenizer)
    templates = chat_templates(folder, tokenizer.tokens.named)
    return Source(
        name=slug(name or folder.resolve().name),
        config=without_generation({k: v for k, v in config.items() if k not in _QUANTISATION}),
        tensors=tensors,
        tokenizer_json=tokenizer.data,
        chat_template=templates.default,
        named_templates=templates.named,
        bos_token=special["bos_token"],
        eos_token=special["eos_token"],
        eos_token_ids=_end_tokens(
            folder, generation.values, config, tokenizer.document, special["eos_token"]
        ),
        sampling=generation.sampling,
        licence=_licence(folder / "README.md"),
        files=tuple(hash_file(path) for path in _files_read(folder, shards)),
        remarks=(
            *(
                []
                if quantisation is None
                else [f"the checkpoint's weights are quantised ({quantisation.method})"]
            ),
            *tokenizer.remarks,
            *generation.remarks,
        ),
    )


def _read_config(folder: Path) -> dict[str, object]:
    """Return config.json.

    Raises:
        PrecastError: config.json is missing or broken, or the directory contains an adapter.
    """
    path = folder / "config.json"
    if plain_file(folder / _ADAPTER):
        raise PrecastError(
            f"{folder}: contains an adapter ({_ADAPTER}), which only modifies another model; merge it into that"
            " model (peft's merge_and_unload()) and export the result of save_pretrained."
        )
    if not plain_file(path):
        found = "none" if any(folder.iterdir()) else "an empty directory"
        raise PrecastError(
            f"{folder}: expected config.json, found {found}; name a Hugging Face model directory."
        )
    return read_json(path)


def _quantisation(folder: Path, config: Mapping[str, object]) -> Quantisation | None:
    """Return the quantisation of the weights, or None.

    Raises:
        PrecastError: the weights are quantised in a way that precast cannot read.
    """
    for key, default in _QUANTISATION.items():
        if stated := config.get(key):
            method = _method(stated, default)
            if isinstance(stated, dict) and (found := quantisation_of(method, stated)) is not None:
                return found
            raise PrecastError(
                f"{folder / 'config.json'}: {key} says that the weights are already quantised ({method}); "
                f"{REMEDIES.get(method, ORIGINAL)}."
            )
    if plain_file(folder / _MODELOPT):
        raise PrecastError(
            f"{folder / _MODELOPT}: says that the weights are already quantised (modelopt); {ORIGINAL}."
        )
    return None


def _method(quantization: object, default: str) -> str:
    """Return the name of the quantisation method; old bitsandbytes configs state only load_in_4bit or load_in_8bit."""
    if not isinstance(quantization, dict):
        return str(quantization)
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        default = "bitsandbytes"
    return str(quantization.get("quant_method") or default)


# --- end tokens, licence --------------------------------------------------------------------------------------


def _end_tokens(
    folder: Path,
    generation: Mapping[str, object],
    config: Mapping[str, object],
    tokenizer: Mapping[str, Any],
    eos_token: str | None,
) -> tuple[int, ...]:
    """Return all end tokens: tokens that a config or the tokenizer names, and tokens with a known text."""
    tokens = token_ids(tokenizer)
    special = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    named = (*named_end_tokens(folder, generation), *named_end_tokens(folder, config))
    own = () if eos_token is None else (tokens.get(eos_token),)
    vocab = config.get("vocab_size")
    by_text = end_tokens_by_text(special, tokens)
    # Tokens without an embedding are left out, because the model never generates them.
    return merge_end_tokens((*named, *own), (i for i in by_text if not isinstance(vocab, int) or i < vocab))


def _licence(card: Path) -> str | None:
    """Return `license` from the front matter of a model card, or `license_name` if `license` is "other"."""
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
        # A model card is written by hand, so broken metadata counts as no licence. Besides its own errors, PyYAML
        # raises errors of Python, such as ValueError for an impossible date.
        return None
    if not isinstance(front, dict):
        return None
    licence = first(front.get("license"))
    return spdx(front.get("license_name") or licence if licence == "other" else licence)


# --- files --------------------------------------------------------------------------------------------------


def _files_read(folder: Path, shards: Mapping[str, object]) -> list[Path]:
    """Return the files that this reader reads, in a fixed order."""
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
