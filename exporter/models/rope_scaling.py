"""Rotary position embeddings (Su et al. 2021): frequencies, their scaling to longer contexts, and the tables."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from .config import ConfigReader

ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The frequencies of the P rotated pairs of a head. The pairs take up the first 2 P of its H dimensions.

    LongRoPE has two sets of frequencies. At every step, transformers chooses a set by the number of tokens so far. An
    export has to choose once, and chooses by its context length, as vLLM chooses by max_model_len.

    Attributes:
        frequencies: ``[P]`` float32, radians per position; a pair with frequency 0 is not rotated.
        magnitude: factor of cosines and sines.
        max_context: largest context to which `frequencies` apply; None for any context.
        long_frequencies: ``[P]``, for contexts above `max_context`; None if such contexts are refused.
    """

    frequencies: np.ndarray
    magnitude: float = 1.0
    max_context: int | None = None
    long_frequencies: np.ndarray | None = None

    @property
    def pairs(self) -> int:
        """P, the number of rotated pairs in each head."""
        return len(self.frequencies)

    def at_context(self, context: int) -> np.ndarray:
        """Return the frequencies ``[P]`` of an export with this context.

        Raises:
            PrecastError: `context` is above `max_context`, and there are no frequencies for such contexts.
        """
        if self.max_context is None or context <= self.max_context:
            return self.frequencies
        if self.long_frequencies is None:
            raise PrecastError(
                f"--context: expected at most {self.max_context}, found {context}; beyond that, the frequencies of this"
                " model's RoPE would change with every token."
            )
        return self.long_frequencies

    def tables(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cosines and sines of every position, each ``[context, P]`` float32.

        Angles are rounded to float32 before the cosine, as in the code that trained the models.

        Raises:
            PrecastError: as `at_context`.
        """
        frequencies = np.asarray(self.at_context(context), np.float32)
        angles = np.arange(context, dtype=np.float32)[:, None] * frequencies
        magnitude = np.float32(self.magnitude)
        return magnitude * np.cos(angles), magnitude * np.sin(angles)


@dataclass(frozen=True, kw_only=True)
class UnscaledRope:
    """The RoPE to which a scaling is applied.

    Attributes:
        theta: the base.
        dims: rotated dimensions of a head.
        max_positions: max_position_embeddings of the config.
        original: original context length that the config or the architecture states outside the RoPE parameters.
    """

    theta: float
    dims: int
    max_positions: int
    original: int | None = None

    @property
    def periods(self) -> np.ndarray:
        """Positions per radian for each pair, ``[P]`` float32; P is half of `dims`, rounded up."""
        exponents = np.arange(0, self.dims, 2, dtype=np.float32) / np.float32(self.dims)
        # The last bit of float32 powers differs between machines; rounded float64 powers agree.
        return (np.float64(np.float32(self.theta)) ** exponents.astype(np.float64)).astype(np.float32)

    @property
    def frequencies(self) -> np.ndarray:
        """Radians per position for each pair, ``[P]`` float32."""
        return np.float32(1) / self.periods


def _is_positive(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _positive(parameters: ConfigReader, key: str, default: float | None = None) -> float:
    """Return a number above zero; the key is required if `default` is None."""
    value = parameters.take(key, default)
    if value is None:
        raise _missing(parameters, key)
    if not _is_positive(value):
        raise parameters.wrong(key, "a number above 0", value)
    return value


def _divisors(parameters: ConfigReader, key: str, pairs: int) -> np.ndarray:
    """Return a list of P numbers above zero as float32."""
    values = parameters.take(key)
    if values is None:
        raise _missing(parameters, key)
    if not isinstance(values, list) or not all(map(_is_positive, values)):
        raise parameters.wrong(key, "a list of numbers above 0", values)
    if len(values) != pairs:
        raise PrecastError(
            f"{parameters.where}: expected {key!r} to have {pairs} numbers (one for each rotated pair), found"
            f" {len(values)}."
        )
    return np.array(values, np.float32)


def _missing(parameters: ConfigReader, key: str) -> PrecastError:
    return PrecastError(f"{parameters.where}: key {key!r} is missing; use the model's complete config.json.")


def _original(base: UnscaledRope, parameters: ConfigReader, default: int | None = None) -> int:
    """Return the original context length from the parameters or the config, or else the default."""
    inside = None if parameters.peek(ORIGINAL) is None else parameters.take_size(ORIGINAL)
    stated = [n for n in (inside, base.original) if n is not None]
    if len(set(stated)) > 1:
        raise PrecastError(
            f"{parameters.where}: {ORIGINAL} is {stated[0]} in the RoPE parameters, but {stated[1]} outside them;"
            " correct the value that is wrong."
        )
    found = stated[0] if stated else default
    if found is None:
        raise _missing(parameters, ORIGINAL)
    if found < 2:
        raise parameters.wrong(ORIGINAL, "a whole number above 1", found)
    return found


def _default(base: UnscaledRope, _: ConfigReader) -> Rope:
    return Rope(frequencies=base.frequencies)


def _linear(base: UnscaledRope, parameters: ConfigReader) -> Rope:
    """Position interpolation (Chen et al. 2023)."""
    return Rope(frequencies=base.frequencies / np.float32(_positive(parameters, "factor")))


def _dynamic(base: UnscaledRope, parameters: ConfigReader) -> Rope:
    """Dynamic NTK-aware scaling (emozilla 2023).

    Up to the model's own context length, the frequencies are unscaled, whatever the factor. Beyond that length, they
    would change with every token, so the export refuses longer contexts.
    """
    _positive(parameters, "factor")
    return Rope(frequencies=base.frequencies, max_context=base.max_positions)


def _llama3(base: UnscaledRope, parameters: ConfigReader) -> Rope:
    """Scale as Llama 3.1 does: divide low frequencies by the factor, keep high ones, and interpolate in between."""
    factor = np.float32(_positive(parameters, "factor"))
    low = _positive(parameters, "low_freq_factor")
    high = _positive(parameters, "high_freq_factor")
    original = _original(base, parameters)
    if high <= low:
        raise PrecastError(
            f"{parameters.where}: expected high_freq_factor above low_freq_factor, found {high} and {low}."
        )
    frequencies = base.frequencies
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = ((original / wavelengths - low) / (high - low)).astype(np.float32)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(wavelengths > original / low, frequencies / factor, blended)
    return Rope(frequencies=np.where(wavelengths < original / high, frequencies, scaled).astype(np.float32))


def _yarn(base: UnscaledRope, parameters: ConfigReader) -> Rope:
    """YaRN (Peng et al. 2023): keep high frequencies, divide low ones by the factor, and interpolate in between."""
    factor = _positive(parameters, "factor")
    magnitude = _yarn_magnitude(factor, parameters)
    low, high = _yarn_range(base, parameters)
    pairs = np.arange(len(base.periods), dtype=np.float32)
    divided = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)  # [P]; 0: kept, 1: divided
    kept = 1 - divided
    slow = np.float32(1) / (np.float32(factor) * base.periods)
    return Rope(frequencies=slow * (1 - kept) + base.frequencies * kept, magnitude=magnitude)


def _yarn_magnitude(factor: float, parameters: ConfigReader) -> float:
    """Return the attention factor of the config, or else compute it (section 3.4 of the YaRN paper).

    If the config has DeepSeek's keys mscale and mscale_all_dim, the factor computed from mscale is divided by the
    factor computed from mscale_all_dim.
    """

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    has_both = all(parameters.peek(key) is not None for key in ("mscale", "mscale_all_dim"))
    above, below = _positive(parameters, "mscale", 1.0), _positive(parameters, "mscale_all_dim", 1.0)
    return _positive(
        parameters, "attention_factor", magnitude(above) / magnitude(below) if has_both else magnitude(1.0)
    )


def _yarn_range(base: UnscaledRope, parameters: ConfigReader) -> tuple[float, float]:
    """Return the first and the last pair whose frequency is interpolated.

    Over the original context, the first pair makes ``beta_fast`` rotations and the last pair ``beta_slow`` rotations.
    """
    fast, slow = _positive(parameters, "beta_fast", 32.0), _positive(parameters, "beta_slow", 1.0)
    truncate = parameters.take_bool("truncate", True)
    original = _original(base, parameters, base.max_positions)
    if fast < slow:
        raise PrecastError(
            f"{parameters.where}: expected beta_fast to be at least beta_slow, found {fast} and {slow}."
        )
    if base.theta <= 1:
        raise parameters.wrong("rope_theta", "a number above 1 for yarn", base.theta)

    def pair(rotations: float) -> float:
        return base.dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base.theta))

    low, high = pair(fast), pair(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, base.dims - 1)
    return low, high + 0.001 if high == low else high


def _longrope(base: UnscaledRope, parameters: ConfigReader) -> Rope:
    """LongRoPE (Ding et al. 2024): a divisor for each frequency, and other divisors for longer contexts."""
    original = _original(base, parameters, base.max_positions)
    factor = _positive(parameters, "factor", base.max_positions / original)
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    periods = base.periods
    near, far = (_divisors(parameters, key, len(periods)) for key in ("short_factor", "long_factor"))
    return Rope(
        frequencies=np.float32(1) / (near * periods),
        magnitude=_positive(parameters, "attention_factor", default),
        max_context=original,
        long_frequencies=np.float32(1) / (far * periods),
    )


SCALINGS: Mapping[str, Callable[[UnscaledRope, ConfigReader], Rope]] = {
    "default": _default,
    "dynamic": _dynamic,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
