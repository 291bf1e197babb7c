"""Rotary position embeddings (Su et al. 2021): frequencies, how they are stretched, and the tables made of them."""

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
    """How fast each of the P pairs of a head is turned, the first 2 P of its H dimensions.

    LongRoPE has two sets of frequencies. transformers chooses by the length of what it is given, at every step anew;
    an export has to choose once, and does so by its context, as vLLM does by max_model_len.

    Attributes:
        frequencies: ``[P]`` float32, radians per position; a zero turns nothing.
        magnitude: what cosines and sines are multiplied by.
        reach: largest context that `frequencies` are for; None for any.
        far_frequencies: ``[P]``, for larger capacities; None where those are refused.
    """

    frequencies: np.ndarray
    magnitude: float = 1.0
    reach: int | None = None
    far_frequencies: np.ndarray | None = None

    @property
    def pairs(self) -> int:
        """P: pairs of a head that are turned."""
        return len(self.frequencies)

    def at_context(self, context: int) -> np.ndarray:
        """The frequencies ``[P]`` of an export with this context.

        Raises:
            PrecastError: for a context at which they depend on the length at hand.
        """
        if self.reach is None or context <= self.reach:
            return self.frequencies
        if self.far_frequencies is None:
            raise PrecastError(
                f"--context: {context} is not possible, because beyond {self.reach} positions the frequencies of this"
                f" model's RoPE depend on the length at hand; expected {self.reach} at most."
            )
        return self.far_frequencies

    def tables(self, context: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines of every position, each ``[context, P]`` float32.

        Angles are rounded to float32 before the cosine, as in the code that such models are trained with.

        Raises:
            PrecastError: as `at_context`.
        """
        frequencies = np.asarray(self.at_context(context), np.float32)
        angles = np.arange(context, dtype=np.float32)[:, None] * frequencies
        magnitude = np.float32(self.magnitude)
        return magnitude * np.cos(angles), magnitude * np.sin(angles)


@dataclass(frozen=True, kw_only=True)
class Base:
    """What scalings start from.

    Attributes:
        theta: positions per radian of the slowest pair, if there were one more.
        dims: dimensions of a head that are turned.
        max_positions: as the config says.
        original: positions before the stretching, where the config says so outside the parameters.
    """

    theta: float
    dims: int
    max_positions: int
    original: int | None = None

    @property
    def periods(self) -> np.ndarray:
        """``[P]`` float32, positions per radian; an odd dimension out has a pair of its own."""
        exponents = np.arange(0, self.dims, 2, dtype=np.float32) / np.float32(self.dims)
        # float32 powers differ between machines in the last bit; rounded ones of float64 do not.
        return (np.float64(np.float32(self.theta)) ** exponents.astype(np.float64)).astype(np.float32)

    @property
    def frequencies(self) -> np.ndarray:
        """``[P]`` float32, radians per position."""
        return np.float32(1) / self.periods


def _is_positive(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _positive(parameters: ConfigReader, key: str, default: float | None = None) -> float:
    """A number above zero; required where `default` is None."""
    value = parameters.take(key, default)
    if value is None:
        raise _missing(parameters, key)
    if not _is_positive(value):
        raise parameters.wrong(key, "a number above 0", value)
    return value


def _divisors(parameters: ConfigReader, key: str, pairs: int) -> np.ndarray:
    """A list of P numbers above zero, as float32."""
    values = parameters.take(key)
    if values is None:
        raise _missing(parameters, key)
    if not isinstance(values, list) or not all(map(_is_positive, values)):
        raise parameters.wrong(key, "a list of numbers above 0", values)
    if len(values) != pairs:
        raise PrecastError(
            f"{parameters.where}: {key!r} has {len(values)} numbers, expected {pairs}, one for each pair turned."
        )
    return np.array(values, np.float32)


def _missing(parameters: ConfigReader, key: str) -> PrecastError:
    return PrecastError(f"{parameters.where}: key {key!r} is missing.")


def _original(base: Base, parameters: ConfigReader, default: int | None = None) -> int:
    """Positions before the stretching, as said among the parameters or outside them; else the default, if any."""
    inside = None if parameters.peek(ORIGINAL) is None else parameters.take_size(ORIGINAL)
    said = [n for n in (inside, base.original) if n is not None]
    if len(set(said)) > 1:
        raise PrecastError(
            f"{parameters.where}: {ORIGINAL} is {said[0]} here and {said[1]} for the model; correct the one that is"
            " wrong."
        )
    found = said[0] if said else default
    if found is None:
        raise _missing(parameters, ORIGINAL)
    if found < 2:
        raise parameters.wrong(ORIGINAL, "a whole number above 1", found)
    return found


def _default(base: Base, _: ConfigReader) -> Rope:
    return Rope(frequencies=base.frequencies)


def _linear(base: Base, parameters: ConfigReader) -> Rope:
    """Position interpolation (Chen et al. 2023)."""
    return Rope(frequencies=base.frequencies / np.float32(_positive(parameters, "factor")))


def _dynamic(base: Base, parameters: ConfigReader) -> Rope:
    """NTK-aware scaling by the length at hand (emozilla 2023): changes nothing up to the model's own positions.

    Beyond them, every length has frequencies of its own, whatever the factor.
    """
    _positive(parameters, "factor")
    return Rope(frequencies=base.frequencies, reach=base.max_positions)


def _llama3(base: Base, parameters: ConfigReader) -> Rope:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between blended."""
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


def _yarn(base: Base, parameters: ConfigReader) -> Rope:
    """YaRN (Peng et al. 2023): pairs that turn often are kept, rare ones divided, those between blended."""
    factor = _positive(parameters, "factor")
    magnitude = _yarn_magnitude(factor, parameters)
    low, high = _yarn_range(base, parameters)
    pairs = np.arange(len(base.periods), dtype=np.float32)
    divided = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)  # [P], how much of each
    kept = 1 - divided
    slow = np.float32(1) / (np.float32(factor) * base.periods)
    return Rope(frequencies=slow * (1 - kept) + base.frequencies * kept, magnitude=magnitude)


def _yarn_magnitude(factor: float, parameters: ConfigReader) -> float:
    """Section 3.4 of the paper; DeepSeek's variant divides two such."""

    def of(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    both = all(parameters.peek(key) is not None for key in ("mscale", "mscale_all_dim"))
    above, below = _positive(parameters, "mscale", 1.0), _positive(parameters, "mscale_all_dim", 1.0)
    return _positive(parameters, "attention_factor", of(above) / of(below) if both else of(1.0))


def _yarn_range(base: Base, parameters: ConfigReader) -> tuple[float, float]:
    """Between which pairs the blending goes on; by how often they turn in the original positions."""
    fast, slow = _positive(parameters, "beta_fast", 32.0), _positive(parameters, "beta_slow", 1.0)
    whole = parameters.take_bool("truncate", True)
    original = _original(base, parameters, base.max_positions)
    if fast < slow:
        raise PrecastError(
            f"{parameters.where}: expected beta_fast not below beta_slow, found {fast} and {slow}."
        )
    if base.theta <= 1:
        raise parameters.wrong("rope_theta", "a number above 1 for yarn", base.theta)

    def pair(turns: float) -> float:
        return base.dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base.theta))

    low, high = pair(fast), pair(slow)
    if whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, base.dims - 1)
    return low, high + 0.001 if high == low else high


def _longrope(base: Base, parameters: ConfigReader) -> Rope:
    """LongRoPE (Ding et al. 2024): each pair has a divisor of its own, and another beyond the original positions."""
    original = _original(base, parameters, base.max_positions)
    factor = _positive(parameters, "factor", base.max_positions / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    periods = base.periods
    near, far = (_divisors(parameters, key, len(periods)) for key in ("short_factor", "long_factor"))
    return Rope(
        frequencies=np.float32(1) / (near * periods),
        magnitude=_positive(parameters, "attention_factor", usual),
        reach=original,
        far_frequencies=np.float32(1) / (far * periods),
    )


SCALINGS: Mapping[str, Callable[[Base, ConfigReader], Rope]] = {
    "default": _default,
    "dynamic": _dynamic,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
