"""RoPE scaling out of a GGUF file, as the `rope_scaling` of a Hugging Face config."""

import math
from collections.abc import Mapping

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from .metadata import MetadataReader

# Divisors of the frequencies, ``[P]``: one tensor that holds for every context, or two for short and long ones.
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

# The constants that every Llama 3.x shares; only `factor` differs between them (8 for 3.1, 32 for 3.2).
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_rope_scaling(
    reader: MetadataReader, theta: float, rotated: int, factors: Mapping[str, np.ndarray]
) -> dict[str, object] | None:
    """What stands under `rope_scaling` in the model's config.json.

    Args:
        reader: the architecture's keys.
        theta: base of the frequencies.
        rotated: how many numbers of a head are turned, 2 P.
        factors: those of the tensors named above that the file has.

    Raises:
        PrecastError: for a scaling that cannot be carried over exactly.
    """
    if LONG_FACTORS in factors or SHORT_FACTORS in factors:
        return _longrope(reader, rotated, factors)
    if (attention := reader.number("rope.scaling.attn_factor", 1.0)) != 1.0:
        raise reader.unexpected("rope.scaling.attn_factor", f"1 without the tensor {LONG_FACTORS}", attention)
    stated = _stated(reader)
    baked = factors.get(ROPE_FACTORS)
    recovered = None if baked is None else _recover_llama3(reader, theta, rotated, baked)
    if recovered is not None and stated is not None:
        raise reader.unexpected(
            "rope.scaling.factor", f"1 beside the tensor {ROPE_FACTORS}", stated["factor"]
        )
    return recovered or stated


def _stated(reader: MetadataReader) -> dict[str, object] | None:
    """The scaling that the keys name; like llama.cpp, a factor without a type is a linear one."""
    kind = reader.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise reader.unexpected("rope.scaling.type", "none, linear or yarn", kind)
    factor = reader.number("rope.scaling.factor", reader.number("rope.scale_linear", 1.0))
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    original = reader.integer("rope.scaling.original_context_length")
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}


# --- Llama 3 ------------------------------------------------------------------------------------------------


def _recover_llama3(
    reader: MetadataReader, theta: float, rotated: int, factors: np.ndarray
) -> dict[str, object] | None:
    """The Llama 3 scaling that `factors` were computed from, or None if they are all one.

    llama.cpp's converter bakes the scaling into one divisor per frequency. Its parameters are found again by
    computing the divisors from the published constants and comparing; any other divisors are refused.
    """
    factor = float(factors.max())
    if factor == 1.0 and float(factors.min()) == 1.0:
        return None
    expected = llama3_divisors(theta, rotated, factor)
    # The converter computes in float32, whence the tolerance; any other constant differs by far more.
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0.0):
        raise PrecastError(
            f"{reader.path}: holds RoPE factors ({ROPE_FACTORS}) that are not those of Llama 3.x, which "
            "alone can be carried over exactly; use the model's Hugging Face checkpoint."
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def llama3_divisors(theta: float, rotated: int, factor: float) -> np.ndarray:
    """What Llama 3.x divides each RoPE frequency by, ``[P]`` in float64.

    Wavelengths over ``original / low`` are stretched `factor` times, those under ``original / high`` not at
    all, and between the two lies a linear blend of the frequencies. Source: `_compute_llama3_parameters` of
    transformers.
    """
    frequencies = theta ** -(np.arange(0, rotated, 2) / rotated)
    turns = _LLAMA3["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / factor + blend)


# --- longrope (Phi 3) ---------------------------------------------------------------------------------------


def _longrope(reader: MetadataReader, rotated: int, factors: Mapping[str, np.ndarray]) -> dict[str, object]:
    """Divisors for short and for long contexts (Ding et al. 2024), with the attention factor that they imply."""
    for name in (LONG_FACTORS, SHORT_FACTORS):
        if name not in factors or factors[name].shape != (rotated // 2,):
            found = list(factors[name].shape) if name in factors else "none"
            raise PrecastError(
                f"{reader.path}: expected {rotated // 2} RoPE factors in the tensor {name}, found {found};"
                " convert the model again."
            )
    if (kind := reader.get("rope.scaling.type", "longrope")) != "longrope":
        raise reader.unexpected("rope.scaling.type", f"longrope beside the tensor {LONG_FACTORS}", kind)
    if (factor := reader.number("rope.scaling.factor", 1.0)) not in (0.0, 1.0):
        raise reader.unexpected("rope.scaling.factor", f"1 beside the tensor {LONG_FACTORS}", factor)
    _check_attention_factor(reader)
    return {
        "rope_type": "longrope",
        "long_factor": _written(factors[LONG_FACTORS]),
        "short_factor": _written(factors[SHORT_FACTORS]),
    }


def _written(factors: np.ndarray) -> list[float]:
    """As they were written before they became float32, and nothing else when they become it again."""
    return [float(str(value)) for value in factors]


def _check_attention_factor(reader: MetadataReader) -> None:
    """What cosines and sines are multiplied by; Hugging Face computes it where the config does not say it."""
    original = reader.integer("rope.scaling.original_context_length", least=2)  # its logarithm is a divisor
    stretch = reader.integer("context_length") / original
    implied = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    stated = reader.number("rope.scaling.attn_factor", 1.0)
    if not math.isclose(stated, implied, rel_tol=1e-6):
        raise reader.unexpected(
            "rope.scaling.attn_factor", f"{implied:.6g}, as the context lengths have it", stated
        )
