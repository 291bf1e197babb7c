"""Upgrade manifests of earlier format versions to the current version before they are parsed.

An upgrade adds the keys that the earlier version lacks, with values that do not change the artifact's answers. The
checks of the current version then apply to the result.
"""

from collections.abc import Callable, Mapping
from typing import Any

from .errors import PrecastError

# The optional sampling defaults of format 4. Format 5 requires a key for every default; null means none.
_SAMPLING_4 = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_SAMPLING_5: Mapping[str, Any] = {
    "max_tokens": None,
    "max_length": None,
    "min_tokens": None,
    "min_length": None,
    "no_repeat_ngram_size": None,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "bad_words_ids": [],
    "stop": [],
}


def upgrade(value: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a manifest of any supported version, converted to the current version.

    Args:
        value: parsed JSON with a known `format_version`. It is not modified.
        where: the file's path, for messages.

    Raises:
        PrecastError: a manifest of an earlier version has a key that a later version added.
    """
    while (step := UPGRADES.get(value["format_version"])) is not None:
        value = step(value, where)
    return value


def _from_4(value: dict[str, Any], where: str) -> dict[str, Any]:
    tokenizer, sampling = value.get("tokenizer"), value.get("sampling")
    if isinstance(tokenizer, dict):
        tokenizer = _with(tokenizer, {"named_templates": {}}, f"{where}: tokenizer")
    if isinstance(sampling, dict):
        sampling = _with(sampling, _SAMPLING_5, f"{where}: sampling")
        sampling = dict.fromkeys(_SAMPLING_4) | sampling | {"top_k": _whole(sampling.get("top_k"))}
    known = {"tokenizer": tokenizer, "sampling": sampling}
    return value | {key: new for key, new in known.items() if key in value} | {"format_version": 5}


def _from_5(value: dict[str, Any], where: str) -> dict[str, Any]:
    # In format 5, targets have no program of the kind "score", and row i of "decode" belongs to slot i. Format 6 still
    # allows such targets.
    return _with(value, {"prefixes": []}, where) | {"format_version": 6}


def _from_6(value: dict[str, Any], where: str) -> dict[str, Any]:
    # Format 7 adds mixed weights. Programs accept them as arguments, like any other weights.
    return value | {"format_version": 7}


def _with(record: dict[str, Any], added: Mapping[str, Any], where: str) -> dict[str, Any]:
    if early := sorted(record.keys() & added.keys()):
        raise PrecastError(
            f"{where}: key {early[0]!r} is not known to this format version; update precast, or export the model again."
        )
    return {**record, **added}


def _whole(top_k: Any) -> Any:
    """Convert top_k to an integer: format 4 stored every default as a float."""
    return int(top_k) if isinstance(top_k, float) and top_k.is_integer() else top_k


# The upgrade from each version to the next.
UPGRADES: Mapping[int, Callable[[dict[str, Any], str], dict[str, Any]]] = {4: _from_4, 5: _from_5, 6: _from_6}
