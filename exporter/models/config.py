"""A strict reader of config.json: unknown keys are errors."""

import math
from collections.abc import Iterable, Mapping
from typing import TypeVar

from precast.loaders.artifact.errors import PrecastError

from .config_keys import HARMLESS, UNSUPPORTED

_T = TypeVar("_T")

# The largest float32, rounded down, and the largest 32-bit size.
_LARGEST_NUMBER = 3.4e38
_LARGEST_SIZE = (1 << 31) - 1


class ConfigReader:
    """A config whose keys are read one by one; `finish` refuses the keys that have not been read.

    Attributes:
        where: name of the config in messages.
    """

    def __init__(self, config: Mapping[str, object], where: str) -> None:
        self.where = where
        self._left = dict(config)

    def take(self, key: str, default: object = None) -> object:
        """Return the value of `key`, or `default` if the key is absent or null; mark the key as read."""
        value = self._left.pop(key, None)
        return default if value is None else value

    def peek(self, key: str) -> object:
        """Return the value of `key`, or None if the key is absent; do not mark the key as read."""
        return self._left.get(key)

    def is_null(self, key: str) -> bool:
        """Return True if `key` is present and null; `take` treats null like an absent key."""
        return key in self._left and self._left[key] is None

    def take_mapping(self, key: str) -> Mapping[str, object]:
        """Return the object at `key`, or an empty object if `key` is absent or null."""
        value = self.take(key, {})
        if not isinstance(value, Mapping):
            raise self.wrong(key, "a JSON object", value)
        return value

    def take_number(self, key: str, default: float) -> float:
        """Return a number, possibly infinite; an integer must be within the range of float32."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or _is_beyond_floats(value):
            raise self.wrong(key, "a number", value)
        return value

    def take_finite(self, key: str, default: float) -> float:
        """Return a number within the range of float32."""
        value = self.take_number(key, default)
        if not abs(value) <= _LARGEST_NUMBER:
            raise self.wrong(key, "a finite number", value)
        return value

    def take_bool(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false", value)
        return value

    def take_choice(self, key: str, choices: Mapping[str, _T], default: str) -> _T:
        """Return the entry of `choices` that the value of `key` names."""
        value = self.take(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(key, f"one of {', '.join(sorted(choices))}", value)
        return choices[value]

    def take_size(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = _LARGEST_SIZE
    ) -> int:
        """Return a whole number from `least` to `most`; the key is required if `default` is None."""
        value = self.take(key, default)
        if value is None:
            raise PrecastError(
                f"{self.where}: key {key!r} is missing; use the complete config.json of a decoder model."
            )
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(key, "a whole number above 0" if least else "a whole number, 0 or more", value)
        if value > most:
            raise self.wrong(key, f"a whole number up to {most:,}", value)
        return value

    def take_nullable_size(self, key: str, default: int | None = None) -> int | None:
        """Return a whole number above zero, None for null, or the default if the key is absent."""
        return None if self._is_none(key, default) else self.take_size(key, default)

    def take_positive(self, key: str, default: float) -> float:
        """Return a finite number above zero."""
        value = self.take_number(key, default)
        if not 0 < value < math.inf:
            raise self.wrong(key, "a number above 0", value)
        return value

    def take_nullable_positive(self, key: str, default: float | None = None) -> float | None:
        """Return a number above zero, None for null, or the default if the key is absent."""
        return None if self._is_none(key, default) else self.take_positive(key, default or 0.0)

    def _is_none(self, key: str, default: object) -> bool:
        return self.is_null(key) or (default is None and key not in self._left)

    def expect(self, key: str, *allowed: object) -> None:
        """Refuse any value of `key` that is not in `allowed`; an absent key and null are accepted too."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise self.wrong(key, " or ".join(repr(a) for a in allowed), value)

    def finish(self) -> None:
        """Refuse unread keys, except those that are null, in `HARMLESS`, or in `UNSUPPORTED` with a neutral value."""
        left = {k: v for k, v in self._left.items() if v is not None and k not in HARMLESS}
        for key, unsupported in UNSUPPORTED.items():
            if key in left and not _is_one_of(left.pop(key), unsupported.neutral):
                raise PrecastError(
                    f"{self.where}: {key!r} is {self._left[key]!r:.80}, which {unsupported.effect}, but precast"
                    " does not support that; remove the key if it does not apply to the model."
                )
        if left:
            raise PrecastError(
                f"{self.where}: {', '.join(map(repr, sorted(left)))} may change the model's maths and"
                f" {'is' if len(left) == 1 else 'are'} not understood; remove {'it' if len(left) == 1 else 'them'} if"
                " transformers' own class for this model_type has no such key, or export another model."
            )

    def wrong(self, key: str, expected: str, found: object) -> PrecastError:
        """Return an error that states the value of a key and the value expected."""
        return PrecastError(f"{self.where}: {key!r} is {found!r:.80}, expected {expected}.")


def _is_beyond_floats(value: float) -> bool:
    """Return True for an integer beyond the range of float32; JSON allows integers of any size."""
    return isinstance(value, int) and abs(value) > _LARGEST_NUMBER


def _is_one_of(value: object, allowed: Iterable[object]) -> bool:
    """Return True if `value` equals an allowed value of the same type, so that 0 is not taken for False or 0.0."""
    return any(type(value) is type(one) and value == one for one in allowed)
