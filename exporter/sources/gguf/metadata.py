"""A GGUF file's metadata.

`check_types` checks the types of all general keys once, so that readers can rely on these types. `MetadataReader`
provides typed access to the keys of an architecture.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from precast.loaders.artifact.errors import PrecastError

_LARGEST = (1 << 31) - 1  # the largest 32-bit size
_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class _Type:
    """The type of a metadata value.

    Attributes:
        name: description of the type in messages.
        holds: returns True for a value of the type.
    """

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

# The keys that begin with the name of the architecture are missing here, because `MetadataReader` checks them.
_TYPES: Mapping[str, _Type] = {
    "general.architecture": _TEXT,
    "general.sampling.min_p": _NUMBER,
    "general.sampling.mirostat": _NUMBER,
    "general.sampling.penalty_repeat": _NUMBER,
    "general.sampling.temp": _NUMBER,
    "general.sampling.top_k": _WHOLE,
    "general.sampling.top_p": _NUMBER,
    "general.sampling.xtc_probability": _NUMBER,
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
    "tokenizer.ggml.fim_pad_token_id": _WHOLE,
    "tokenizer.ggml.fim_rep_token_id": _WHOLE,
    "tokenizer.ggml.fim_sep_token_id": _WHOLE,
    "tokenizer.ggml.merges": _list_of(_TEXT, "strings"),
    "tokenizer.ggml.model": _TEXT,
    "tokenizer.ggml.pre": _TEXT,
    "tokenizer.ggml.scores": _list_of(_NUMBER, "numbers"),
    "tokenizer.ggml.token_type": _list_of(_WHOLE, "whole numbers"),
    "tokenizer.ggml.tokens": _list_of(_TEXT, "strings"),
}


def check_types(path: Path, metadata: Mapping[str, Any]) -> None:
    """Check the types of the general keys, so that readers can rely on them.

    Args:
        path: the file, for messages.
        metadata: all metadata of the file; keys may be absent.

    Raises:
        PrecastError: a value has the wrong type; the error names the first such key.
    """
    for key, expected in _TYPES.items():
        if key in metadata and not expected.holds(metadata[key]):
            raise PrecastError(
                f"{path}: expected {key} to be {expected.name}, found {metadata[key]!r:.80}; convert the model"
                " again."
            )


@dataclass(frozen=True, kw_only=True)
class MetadataReader:
    """Typed access to an architecture's keys, which are named without the architecture's prefix.

    Attributes:
        path: the file, for messages.
        prefix: name of the architecture, which is the prefix of its keys.
        metadata: all metadata of the file.
    """

    path: Path
    prefix: str
    metadata: Mapping[str, Any]

    def get(self, key: str, default: object = None) -> object:
        """Return the value of a key, or `default` if the file lacks the key. A list of equal items becomes one item.

        Raises:
            PrecastError: the file lacks the key, and there is no default.
        """
        value = self.metadata.get(f"{self.prefix}.{key}", default)
        if value is None:
            raise PrecastError(
                f"{self.path}: lacks the metadata key {self.prefix}.{key}; convert the model again."
            )
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]
        return value

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Return a whole number from `least` to the largest valid size."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST:
            raise self.unexpected(key, "one positive whole number" if least else "one whole number", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a float32 as the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _FLOAT32:
            raise self.unexpected(key, "one number", value)
        return float(str(np.float32(value)))

    def positive(self, key: str, default: float | None = None) -> float:
        """Return a number above zero."""
        value = self.number(key, default)
        if not value > 0:
            raise self.unexpected(key, "a number above 0", value)
        return value

    def unexpected(self, key: str, expected: str, found: object) -> PrecastError:
        """Return an error for a key whose value cannot be converted."""
        return PrecastError(
            f"{self.path}: expected {self.prefix}.{key} to be {expected}, found {found!r:.80}; use the model's "
            "Hugging Face checkpoint."
        )
