"""The parameters of generation, checked on construction."""

import math
from collections.abc import Mapping
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifact.errors import PrecastError
from ..artifact.frozen import Frozen


class SamplingParams(Frozen):
    """Immutable parameters of a generation; threads may share them.

    By default decoding is greedy, and ends at an end-of-generation token or when the context is full.

    Raises:
        PrecastError: a parameter is unknown, of the wrong type, out of range, or passed by position.
    """

    max_tokens: int | None = None
    """Maximum number of tokens to generate; None: until the context is full."""
    max_length: int | None = None
    """Maximum length of prompt and answer together, in tokens; ignored if max_tokens is given."""
    min_tokens: int = 0
    """Minimum length of the answer, in tokens: no end-of-generation token is chosen before."""
    min_length: int = 0
    """Minimum length of prompt and answer together; ignored if min_tokens is given."""
    temperature: float = 0.0
    """Divisor of the logits; 0 is greedy, and then top_k, top_p and min_p have no effect."""
    top_k: int = 0
    """Keep the k most likely tokens, and those tied with the last of them; 0 is off."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens that together reach this probability; 1 is off."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely one; 0 is off."""
    repetition_penalty: float = 1.0
    """Make tokens of the prompt and the answer less likely (CTRL, arXiv:1909.05858); 1 is off."""
    no_repeat_ngram_size: int = 0
    """Forbid sequences of this many tokens that occurred before in the prompt or the answer; 0 is off."""
    suppress_tokens: tuple[int, ...] = ()
    """Tokens that are never chosen."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Tokens that may not start the answer."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that are never completed. A single end-of-generation token is not forbidden."""
    seed: int | None = None
    """Seed of the random numbers; None uses fresh entropy."""
    stop: tuple[str, ...] = ()
    """Strings that end generation; they are not part of the answer."""
    ignore_eos: bool = False
    """Continue after an end-of-generation token."""

    if not TYPE_CHECKING:  # type checkers derive the constructor from the fields

        def __init__(self, *values: Any, **fields: Any) -> None:
            _check_names(values, fields)
            super().__init__(**fields)

    def __post_init__(self) -> None:
        checked = self.__dict__
        for name, low in _WHOLE.items():
            if checked[name] is not None or name not in _OPTIONAL:
                checked[name] = _integer(name, checked[name], low=low)
        for name, high in _REAL.items():
            checked[name] = _real(name, checked[name], high=high)
        if self.repetition_penalty == 0:
            raise PrecastError("Sampling parameters: repetition_penalty must be greater than 0, found 0.")
        if not isinstance(self.ignore_eos, bool):
            raise PrecastError(
                f"Sampling parameters: ignore_eos must be true or false, found {self.ignore_eos!r:.60}."
            )
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            checked[name] = _token_ids(name, checked[name])
        checked["bad_words_ids"] = _sequences("bad_words_ids", checked["bad_words_ids"])
        checked["stop"] = _checked_stop(self.stop)

    @property
    def is_constrained(self) -> bool:
        """True if any parameter may forbid tokens."""
        return bool(
            self.min_tokens
            or self.min_length
            or self.no_repeat_ngram_size
            or self.suppress_tokens
            or self.begin_suppress_tokens
            or self.bad_words_ids
        )

    def limit(self, prompt_tokens: int, room: int) -> int:
        """Return the maximum number of tokens to generate after a prompt.

        Args:
            prompt_tokens: length of the prompt.
            room: positions left in the context.

        Raises:
            PrecastError: the prompt reaches max_length.
        """
        if self.max_tokens is not None:
            return min(self.max_tokens, room)
        if self.max_length is None:
            return room
        if prompt_tokens >= self.max_length:
            raise PrecastError(
                f"prompt: its {prompt_tokens} tokens reach max_length, {self.max_length}; raise max_length, or"
                " give max_tokens instead."
            )
        return min(self.max_length - prompt_tokens, room)


# Minimum of each whole number, and maximum of each real one. Integers go up to 2^63 - 1, as in a manifest, except the
# seed: a generator's state has 128 bits.
_WHOLE = {
    "max_tokens": 1,
    "max_length": 1,
    "min_tokens": 0,
    "min_length": 0,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "seed": 0,
}
_OPTIONAL = ("max_tokens", "max_length", "seed")
_REAL = {"temperature": math.inf, "top_p": 1.0, "min_p": 1.0, "repetition_penalty": math.inf}
_SMALLEST, _LARGEST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


def _check_names(values: tuple[object, ...], fields: Mapping[str, object]) -> None:
    known = SamplingParams.__dataclass_fields__
    if values:
        raise PrecastError(
            "Sampling parameters: expected keyword arguments (temperature=0.7), found the positional argument"
            f" {values[0]!r:.60}."
        )
    if unknown := sorted(fields.keys() - known.keys()):
        raise PrecastError(
            f"Sampling parameters: {unknown[0]!r} is unknown, expected one of {', '.join(known)}."
        )


def _integer(name: str, value: Any, *, low: int) -> int:
    bits = 128 if name == "seed" else 63
    known = isinstance(value, Integral) and not isinstance(value, bool)
    if not known or not low <= int(value) < 1 << bits:
        raise PrecastError(
            f"Sampling parameters: {name} must be an integer from {low} to 2^{bits} - 1, found {value!r:.60}."
        )
    return int(value)


def _real(name: str, value: Any, *, high: float) -> float:
    """Return a number within the range of float32, the type of the logits."""
    known = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    value = value.item() if isinstance(value, np.generic) else value
    # Compare before converting: an int may exceed the range of a float.
    if known and (value == 0 or _SMALLEST <= value <= min(high, _LARGEST)):
        return float(value)
    wanted = "at least 0" if math.isinf(high) else f"between 0 and {high:g}"
    if known and 0 < value <= high and value < math.inf:
        wanted += f" that float32 holds, which is 0 or from {_SMALLEST:.2g} to {_LARGEST:.2g}"
    raise PrecastError(f"Sampling parameters: {name} must be a finite number {wanted}, found {value!r:.60}.")


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise PrecastError(f"Sampling parameters: {name} must be a list of token ids, found {value!r:.60}.")
    return tuple(_integer(f"a token id of {name}", token, low=0) for token in value)


def _sequences(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, (tuple, list)) or not all(
        isinstance(item, (tuple, list)) and item for item in value
    ):
        raise PrecastError(
            f"Sampling parameters: {name} must be a list of lists of token ids, none empty, found {value!r:.60}."
        )
    return tuple(_token_ids(name, item) for item in value)


def _checked_stop(stop: Any) -> tuple[str, ...]:
    if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) and text for text in stop):
        raise PrecastError(
            f"Sampling parameters: stop must be a list of non-empty strings, found {stop!r:.60}."
        )
    return tuple(stop)
