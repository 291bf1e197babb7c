"""Tokenizers, and data derived from their vocabularies, kept after a model is unloaded.

With 49,152 tokens, parsing a `tokenizer.json` takes 60 ms, and reading its vocabulary for constraints takes 130 ms.
Meanwhile, the libraries hold Python's lock, so a server answers no request.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from ..artifact.manifest import FileEntry, Manifest
    from .tokenizer import Tokenizer

_Value = TypeVar("_Value")
# Bytes of the `tokenizer.json` files whose tokenizers are kept. A tokenizer takes 8 times the size of its file, and its
# vocabulary for constraints takes as much again.
_MOST_BYTES = 32 << 20
# Values kept for each vocabulary. Models with one `tokenizer.json` rarely differ in vocabulary size and end tokens.
_MOST_VALUES = 2


class Derived:
    """The values that were used most recently of those made from a vocabulary. Threads may share them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """Return the value of a key. Make the value if there is none; another thread that needs one waits."""
        with self._lock:
            if key not in self._values:
                self._values[key] = make()
            self._values.move_to_end(key)
            if len(self._values) > _MOST_VALUES:
                self._values.popitem(last=False)
            return cast(_Value, self._values[key])


class KnownTokenizers:
    """The tokenizers of the models that were loaded most recently. Threads may share them.

    Args:
        most_bytes: maximum size of the kept tokenizers' files together. The latest tokenizer is kept in any case.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._lock, self._most_bytes = Lock(), most_bytes
        self._kept: OrderedDict[str, tuple[Tokenizer, int]] = OrderedDict()

    def find(self, manifest: "Manifest") -> "Tokenizer | None":
        """Return the tokenizer of an artifact, without chat templates; None if the tokenizer is not kept."""
        with self._lock:
            kept = self._kept.get(_entry(manifest).sha256)
            return None if kept is None else kept[0]

    def keep(self, manifest: "Manifest", tokenizer: "Tokenizer") -> None:
        """Keep the tokenizer of a loaded artifact, and drop those that were loaded least recently."""
        entry = _entry(manifest)
        with self._lock:
            self._kept[entry.sha256] = tokenizer.with_templates(), entry.bytes
            self._kept.move_to_end(entry.sha256)
            while len(self._kept) > 1 and sum(size for _, size in self._kept.values()) > self._most_bytes:
                self._kept.popitem(last=False)


def _entry(manifest: "Manifest") -> "FileEntry":
    return manifest.files[manifest.tokenizer.file]
