"""The types of a GGUF file's metadata: checked once, so that what reads it later may rely on them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precast.loaders.artifact.errors import PrecastError


@dataclass(frozen=True, kw_only=True)
class _Type:
    """What a value has to be: its name in messages, and the test."""

    name: str
    holds: Callable[[Any], bool]


def _list_of(item: _Type, plural: str) -> _Type:
    return _Type(
        name=f"a list of {plural}",
        holds=lambda value: isinstance(value, list) and all(map(item.holds, value)),
    )


_TEXT = _Type(name="text", holds=lambda value: isinstance(value, str))
_SWITCH = _Type(name="true or false", holds=lambda value: isinstance(value, bool))
_WHOLE = _Type(
    name="a whole number", holds=lambda value: isinstance(value, int) and not isinstance(value, bool)
)
_NUMBER = _Type(
    name="a number", holds=lambda value: isinstance(value, int | float) and not isinstance(value, bool)
)

# Those of the keys below the architecture's own prefix are checked where they are read.
_TYPES: Mapping[str, _Type] = {
    "general.architecture": _TEXT,
    "general.sampling.min_p": _NUMBER,
    "general.sampling.penalty_repeat": _NUMBER,
    "general.sampling.temp": _NUMBER,
    "general.sampling.top_k": _WHOLE,
    "general.sampling.top_p": _NUMBER,
    "general.type": _TEXT,
    "split.count": _WHOLE,
    "tokenizer.chat_template": _TEXT,
    "tokenizer.ggml.add_bos_token": _SWITCH,
    "tokenizer.ggml.add_eos_token": _SWITCH,
    "tokenizer.ggml.add_space_prefix": _SWITCH,
    "tokenizer.ggml.bos_token_id": _WHOLE,
    "tokenizer.ggml.eom_token_id": _WHOLE,
    "tokenizer.ggml.eos_token_id": _WHOLE,
    "tokenizer.ggml.eot_token_id": _WHOLE,
    "tokenizer.ggml.merges": _list_of(_TEXT, "texts"),
    "tokenizer.ggml.model": _TEXT,
    "tokenizer.ggml.pre": _TEXT,
    "tokenizer.ggml.scores": _list_of(_NUMBER, "numbers"),
    "tokenizer.ggml.token_type": _list_of(_WHOLE, "whole numbers"),
    "tokenizer.ggml.tokens": _list_of(_TEXT, "texts"),
}


def check_types(path: Path, metadata: Mapping[str, Any]) -> None:
    """Looks at every key that a reader takes as it is.

    Args:
        path: the file, for messages.
        metadata: all of its metadata; keys may be absent.

    Raises:
        PrecastError: naming the first key whose value is of another type than the format says.
    """
    for key, expected in _TYPES.items():
        if key in metadata and not expected.holds(metadata[key]):
            raise PrecastError(
                f"{path}: expected {key} to be {expected.name}, found {metadata[key]!r:.80}; convert the model"
                " again."
            )
