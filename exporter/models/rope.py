"""Rotary position embeddings (Su et al. 2021): which frequencies, and the tables made of them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from .config import ConfigReader


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Frequencies of the H / 2 rotations, ``[H / 2]`` float32, radians per position."""

    frequencies: np.ndarray

    def tables(self, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines of every position, each ``[capacity, H / 2]`` float32.

        Angles are rounded to float32 before the cosine, as in the code that such models are trained with.
        """
        angles = np.arange(capacity, dtype=np.float32)[:, None] * self.frequencies
        return np.cos(angles), np.sin(angles)


def read_rope(config: ConfigReader, head_dim: int) -> Rope:
    """Reads the RoPE keys of a config, in both spellings.

    Older files have ``rope_theta`` and ``rope_scaling``, newer ones ``rope_parameters`` with everything in it.

    Raises:
        PrecastError: for a RoPE type that is not understood, and for missing, unknown or unusable parameters.
    """
    parameters = _parameters(config)
    reader = ConfigReader(parameters, f"{config.where} rope parameters")
    theta = config.take_number("rope_theta", 10_000.0)
    theta = reader.take_number("rope_theta", theta)
    if not 0 < theta < math.inf:
        raise PrecastError(f"{config.where}: 'rope_theta' is {theta!r}, expected a number above 0.")
    if any(place.take_number("partial_rotary_factor", 1.0) != 1.0 for place in (config, reader)):
        raise PrecastError(f"{config.where}: partial_rotary_factor other than 1 is not supported.")
    names = {str(value) for key in ("rope_type", "type") if (value := reader.take(key)) is not None}
    if len(names) > 1:
        raise PrecastError(f"{config.where}: rope_type and type disagree: {' and '.join(sorted(names))}.")
    kind = names.pop() if names else "default"
    if kind not in SCALINGS:
        raise PrecastError(
            f"{config.where}: RoPE type {kind!r} is not supported; expected one of {', '.join(sorted(SCALINGS))}."
        )
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.float32(theta) ** exponents).astype(np.float32)
    scaled = SCALINGS[kind](frequencies, reader)
    reader.finish()
    return Rope(frequencies=scaled)


def _parameters(config: ConfigReader) -> dict[str, object]:
    """The table of parameters, under its older or its newer name.

    transformers forgets the newer one where both are there; then they have to say the same.
    """
    tables = [dict(config.take_mapping(key)) for key in ("rope_parameters", "rope_scaling")]
    newer, older = ({k: v for k, v in table.items() if v is not None} for table in tables)
    if not newer or not older:
        return newer or older
    spelt = {"rope_type": older.get("type"), "type": older.get("rope_type")}
    said = {"rope_theta": config.peek("rope_theta"), **spelt, **older}
    if differing := sorted(key for key in newer if newer[key] != said.get(key)):
        raise PrecastError(
            f"{config.where}: rope_parameters and rope_scaling disagree about {', '.join(map(repr, differing))}; remove"
            " the one that is wrong."
        )
    return newer | older


def _default(frequencies: np.ndarray, _: ConfigReader) -> np.ndarray:
    return frequencies


def _linear(frequencies: np.ndarray, parameters: ConfigReader) -> np.ndarray:
    """Position interpolation (Chen et al. 2023)."""
    return frequencies / np.float32(parameters.need_positive("factor"))


def _llama3(frequencies: np.ndarray, parameters: ConfigReader) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between blended."""
    factor = np.float32(parameters.need_positive("factor"))
    low = parameters.need_positive("low_freq_factor")
    high = parameters.need_positive("high_freq_factor")
    original = parameters.need_positive("original_max_position_embeddings")
    if high <= low:
        raise PrecastError(
            f"{parameters.where}: expected high_freq_factor above low_freq_factor, found {high} and {low}."
        )
    wavelengths = np.float32(2 * math.pi) / frequencies
    smooth = ((original / wavelengths - low) / (high - low)).astype(np.float32)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = np.where(wavelengths > original / low, frequencies / factor, blended)
    return np.where(wavelengths < original / high, frequencies, scaled).astype(np.float32)


SCALINGS: Mapping[str, Callable[[np.ndarray, ConfigReader], np.ndarray]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
}
