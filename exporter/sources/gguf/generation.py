"""Generation settings of a GGUF file: end tokens and the recommended sampler."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from precast.loaders.artifact.errors import PrecastError

from ..end_of_generation import end_tokens_by_text, merge_end_tokens
from .markers import repaired_types
from .vocabulary import TokenType

# Keys of the tokens at which llama.cpp ends a generation: ends of a sequence, a turn and a message, then separators of
# files. llama.cpp ignores a separator's key if the vocabulary has no token with that id.
_ENDS = ("eos", "eot", "eom")
_BETWEEN_FILES = ("fim_pad", "fim_rep", "fim_sep")
_SPECIAL = (TokenType.CONTROL, TokenType.USER_DEFINED)
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
# Keys of samplers that precast lacks, each with the value that turns the sampler off.
_REFUSED = {"mirostat": 0, "xtc_probability": 0}


def end_tokens(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the ids of the end tokens: first those that the metadata name, then those whose text is known."""
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    types = repaired_types(tokens, types, metadata)
    special: dict[str, int] = {}
    plain: dict[str, int] = {}
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != TokenType.UNUSED:
            (special if kind in _SPECIAL else plain)[token] = number
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in _ENDS]
    others = [metadata.get(f"tokenizer.ggml.{key}_token_id", -1) for key in _BETWEEN_FILES]
    named += [token for token in others if 0 <= token < len(tokens)]
    return merge_end_tokens(named, end_tokens_by_text(special, plain))


def recommended_sampling(path: Path, metadata: Mapping[str, Any]) -> dict[str, object]:
    """Return the sampling parameters that the file recommends, by field of the manifest's `SamplingDefaults`.

    Newer converters copy these parameters from generation_config.json. The export checks their ranges later.

    Raises:
        PrecastError: the file recommends a sampler that precast lacks.
    """
    for key, off in _REFUSED.items():
        if (value := metadata.get(f"general.sampling.{key}", off)) != off:
            raise PrecastError(
                f"{path}: general.sampling.{key} is {value!r:.60}, but precast does not have this sampler; remove the"
                f" key (gguf_new_metadata.py --remove-metadata general.sampling.{key})."
            )
    found = {field: metadata.get(f"general.sampling.{key}") for key, field in _SAMPLING.items()}
    given = {field: value for field, value in found.items() if value is not None}
    # Without a temperature, decoding is greedy, so only the repetition penalty has an effect.
    return (
        given if given.get("temperature") else {k: v for k, v in given.items() if k == "repetition_penalty"}
    )
