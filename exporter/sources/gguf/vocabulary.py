"""The vocabulary in a GGUF file's metadata, with its lists checked against each other."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from precast.loaders.artifact.errors import PrecastError

from .markers import repaired_types

_PREFIX = "tokenizer.ggml."

# Keys that the readers of the vocabulary and the tokenizer use, and keys that are accepted only with a value that has
# no effect. All keys that end in _token_id are accepted.
_KNOWN = frozenset(
    {
        "model",
        "pre",
        "tokens",
        "token_type",
        "scores",
        "merges",
        "add_bos_token",
        "add_eos_token",
        "add_space_prefix",
    }
)
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "add_sep_token": (False,),
    "remove_extra_whitespaces": (False,),
    "precompiled_charsmap": ([], ""),
    "token_type_count": (0, 1),
}


class TokenType(IntEnum):
    """The kind of a token, with llama.cpp's numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The vocabulary of a GGUF file, from the metadata keys that begin with ``tokenizer.ggml.``.

    Attributes:
        path: the file, for messages.
        metadata: all metadata of the file.
        tokens: text of each token, by id.
        types: `TokenType` of each token, by id.
    """

    path: Path
    metadata: Mapping[str, Any]
    tokens: list[str]
    types: list[int]

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or `default`; `key` is given without ``tokenizer.ggml.``."""
        return self.metadata.get(f"{_PREFIX}{key}", default)

    def of_types(self, *types: TokenType) -> dict[str, int]:
        """Return the tokens of the given types: a mapping from text to id."""
        return {
            token: i
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in types
        }

    def error(self, sentence: str) -> PrecastError:
        """Return an error that consists of the path and `sentence`, such as "lacks …"."""
        return PrecastError(f"{self.path}: {sentence}")


def read_vocabulary(path: Path, metadata: Mapping[str, Any]) -> Vocabulary:
    """Read the metadata keys that begin with ``tokenizer.ggml.``.

    Args:
        path: the file, for messages.
        metadata: all metadata of the file.

    Raises:
        PrecastError: the lists contradict each other, or a key is not understood.
    """
    tokens = metadata.get(f"{_PREFIX}tokens")
    if not isinstance(tokens, list) or not tokens:
        raise PrecastError(
            f"{path}: contains no vocabulary (tokenizer.ggml.tokens); convert the model again."
        )
    types = metadata.get(f"{_PREFIX}token_type") or [int(TokenType.NORMAL)] * len(tokens)
    vocabulary = Vocabulary(path=path, metadata=metadata, tokens=tokens, types=types)
    if len(types) != len(tokens):
        raise vocabulary.error(
            f"has {len(tokens)} tokens but {len(types)} token types; convert the model again."
        )
    if unknown := sorted(set(types) - set(TokenType)):
        raise vocabulary.error(
            f"has tokens of type {unknown[0]}, which is not understood; convert the model again."
        )
    _refuse_unknown(vocabulary)
    types = repaired_types(tokens, types, metadata)
    vocabulary = replace(vocabulary, types=types)
    used = [token for token, kind in zip(tokens, types, strict=True) if kind != TokenType.UNUSED]
    if len(set(used)) != len(used):
        twice = next(token for i, token in enumerate(used) if token in used[:i])
        raise vocabulary.error(f"has the token {twice!r} twice; convert the model again.")
    return vocabulary


def _refuse_unknown(vocabulary: Vocabulary) -> None:
    for key, value in vocabulary.metadata.items():
        short = key.removeprefix(_PREFIX)
        if short == key or short in _KNOWN or short.endswith("_token_id") or value in _NEUTRAL.get(short, ()):
            continue
        raise vocabulary.error(
            f"has the metadata key {key}, which is not understood and may change how text becomes tokens; "
            "use the model's Hugging Face checkpoint."
        )
