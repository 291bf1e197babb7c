"""A file with the state of a sequence: the tokens, the keys and values of these tokens, and the messages of a chat.

It is a safetensors file. It contains a tensor for each array of the KV cache, ``[L, K, n, H]`` or ``[L, K, n]``, and a
tensor for the tokens, int32 ``[n]``. Arrays of layers with a sliding window contain only the positions of the last
window. The metadata contains the format's version, the origin of the keys and values (the model, the programs and the
instruction set that computed them), the messages as JSON, and the sha256 of all other contents. A state with a
different origin is refused.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import files
from ..artifact.errors import PrecastError
from ..artifact.frozen import Frozen
from ..artifact.json_records import parse_json
from ..artifact.manifest import CacheArray
from ..artifact.origin import Origin
from ..artifact.weights import file_parts, map_weights, numpy_dtype, read_metadata
from ..text.chat_messages import plain_messages
from .kv_state import Span, bits

_VERSION, _VERSION_KEY, _HASH_KEY = "1", "precast_state", "sha256"
_TOKENS = "tokens"
_REMEDY = "start a new state in another file"
# Number of elements that are checked for NaN and infinity at a time.
_BLOCK = 1 << 22


class State(Frozen):
    """The state of a sequence.

    Attributes:
        tokens: all tokens of the sequence.
        messages: the messages of the chat, oldest first; empty if the sequence is not a chat.
    """

    tokens: tuple[int, ...]
    messages: tuple[Mapping[str, Any], ...]


class StoredState(Frozen):
    """A state with its keys and values.

    Attributes:
        state: tokens and messages.
        spans: keys and values of all tokens, by array, mapped from the file.
        watch: the detector of later writes to the file.
    """

    state: State
    spans: Mapping[str, Span]
    watch: files.Watch


def write_state(
    path: Path, state: State, spans: Mapping[str, Span], arrays: Sequence[CacheArray], origin: Origin
) -> None:
    """Write a state to a file atomically. Only the current user may read the file.

    Args:
        path: the file to create or to replace.
        state: tokens and messages.
        spans: keys and values of the tokens, by array.
        arrays: the arrays of the KV cache.
        origin: the origin of the keys and values.

    Raises:
        PrecastError: the file cannot be written, or a message cannot be stored as JSON.
    """
    tensors = {_TOKENS: np.array(state.tokens, np.int32), **stored_arrays(spans, arrays)}
    metadata = {_VERSION_KEY: _VERSION, **vars(origin), "messages": _message_text(state.messages)}
    metadata[_HASH_KEY] = _digest(tensors, metadata)
    try:
        files.write_atomically(path, *file_parts(tensors, metadata), sync=True)
    except OSError as error:
        raise PrecastError(
            f"{path}: the state cannot be written ({error.strerror or error}); choose another file, or free disk space."
        ) from None


def _message_text(messages: Sequence[Mapping[str, Any]]) -> str:
    try:
        text = json.dumps([dict(message) for message in messages], ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise PrecastError(
            f"messages: expected values that JSON can represent, found another value ({error}); remove it."
        ) from None
    return text


def stored_arrays(spans: Mapping[str, Span], arrays: Sequence[CacheArray]) -> dict[str, np.ndarray]:
    """Return the arrays of spans by name, viewed as the KV cache's own types."""
    return {array.name: spans[array.name].array.view(numpy_dtype(array.dtype)) for array in arrays}


def read_state(
    path: Path, arrays: Sequence[CacheArray], origin: Origin, *, context: int, vocab: int
) -> StoredState:
    """Check an untrusted state file, and map its keys and values into memory.

    Args:
        path: the file.
        arrays: the arrays of the KV cache.
        origin: the origin that the state must have.
        context: maximum number of tokens.
        vocab: the size of the vocabulary.

    Raises:
        PrecastError: the file is missing or damaged, is not a state, or has a different origin.
    """
    try:
        with files.open_plain(path) as file:
            try:
                metadata, tensors = read_metadata(file), map_weights(file)
            except PrecastError:
                raise _damaged(path, "a complete safetensors file", "something else") from None
            _check_origin(path, metadata, origin)
            watch = files.Watch(file)
    except OSError as error:
        raise PrecastError(
            f"{path}: the state cannot be read ({error.strerror or error}); check the path."
        ) from None
    stated = metadata.get(_HASH_KEY, "")
    if _digest(tensors, {k: v for k, v in metadata.items() if k != _HASH_KEY}) != stated:
        raise _damaged(path, "contents that match the sha256 in the header", "different contents")
    tokens = _checked_tokens(path, tensors.pop(_TOKENS, None), context, vocab)
    spans = checked_spans(str(path), tensors, arrays, len(tokens))
    for name, span in spans.items():
        if not _is_finite(span.array, next(a.dtype for a in arrays if a.name == name)):
            raise _damaged(path, f"finite numbers in {name!r}", "NaN or infinity")
    state = State(tokens=tokens, messages=_messages(path, metadata.get("messages", "")))
    return StoredState(state=state, spans=spans, watch=watch)


def checked_spans(
    where: str,
    tensors: Mapping[str, np.ndarray],
    arrays: Sequence[CacheArray],
    count: int,
    remedy: str = _REMEDY,
) -> dict[str, Span]:
    """Return stored arrays as spans, after checking their types and shapes against the KV cache.

    Args:
        where: the file, for error texts.
        tensors: the arrays by name.
        arrays: the arrays of the KV cache.
        count: number of tokens whose keys and values the arrays must contain.
        remedy: the remedy that error texts name.

    Raises:
        PrecastError: an array is missing, unknown, or of another type or shape.
    """
    spans = {}
    for array in arrays:
        kept = min(count, array.window) if array.window else count
        sizes = {**dict(zip(array.axes, array.shape, strict=True)), "S": kept}
        expected = (array.dtype, tuple(sizes[letter] for letter in "LKSH" if letter in sizes))
        tensor = tensors.get(array.name)
        found = None if tensor is None else (tensor.dtype.name, tensor.shape)
        if tensor is None or found != expected:
            raise _damaged(where, f"{array.name!r} as {_type(expected)}", _type(found), remedy)
        spans[array.name] = Span(count - kept, tensor.view(bits(array.dtype)))
    if unknown := sorted(set(tensors) - set(spans)):
        raise _damaged(where, "only the arrays of the KV cache", f"another array, {unknown[0]!r:.40}", remedy)
    return spans


def _type(value: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if value is None else f"{value[0]} {list(value[1])}"


def _damaged(where: Path | str, expected: str, found: str, remedy: str = _REMEDY) -> PrecastError:
    return PrecastError(f"{where}: expected {expected}, found {found}, so the file is damaged; {remedy}.")


def _check_origin(path: Path, metadata: Mapping[str, str], origin: Origin) -> None:
    if (version := metadata.get(_VERSION_KEY)) != _VERSION:
        found = "a different file" if version is None else f"version {version:.20}"
        raise PrecastError(
            f"{path}: expected a precast state of version {_VERSION}, found {found}; choose another file."
        )
    given = Origin(**{field: metadata.get(field, "") for field in vars(origin)})
    for what, (found, expected) in given.differences(origin).items():
        raise PrecastError(
            f"{path}: expected a state computed with {what} {_short(expected)}, found {_short(found)}; choose another"
            " file, or start a new state."
        )


def _short(value: str) -> str:
    return f"sha256 {value:.12}…" if len(value) == 64 and " " not in value else f"{value!r:.300}"


def _checked_tokens(path: Path, tokens: np.ndarray | None, context: int, vocab: int) -> tuple[int, ...]:
    if tokens is None or tokens.dtype != np.int32 or tokens.ndim != 1 or not 1 <= len(tokens) <= context:
        found = None if tokens is None else (tokens.dtype.name, tokens.shape)
        raise _damaged(path, f"1 to {context} tokens as int32", _type(found))
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise _damaged(path, f"tokens from 0 to {vocab - 1}", "a token outside this range")
    return tuple(tokens.tolist())


def _messages(path: Path, text: str) -> tuple[Mapping[str, Any], ...]:
    try:
        messages = parse_json(text.encode(), str(path))
        if messages != []:
            plain_messages(messages)
    except PrecastError:
        raise _damaged(path, "the messages of a chat", "something else") from None
    return tuple(messages)


def _digest(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Return the sha256 of tensors and metadata, in hex."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, tensor.dtype.name, tensor.shape]).encode())
        digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


# The mask of the exponent's bits. In NaN and infinity, all of these bits are 1.
_EXPONENTS: Mapping[str, int] = {"float32": 0x7F800000, "bfloat16": 0x7F80}


def _is_finite(array: np.ndarray, dtype: str) -> bool:
    """Return True if an array of bit patterns contains neither NaN nor infinity."""
    exponent = _EXPONENTS.get(dtype)
    if exponent is None:  # int8
        return True
    flat = array.reshape(-1)
    blocks = (flat[at : at + _BLOCK] for at in range(0, flat.size, _BLOCK))
    return not any(bool(((block & exponent) == exponent).any()) for block in blocks)
