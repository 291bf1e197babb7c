"""RoPE scaling of a GGUF file, as the `rope_scaling` of a Hugging Face config."""

import math
from collections.abc import Mapping

import numpy as np

from precast.loaders.artifact.errors import PrecastError

from .metadata import MetadataReader

# Tensors of frequency divisors, ``[P]``: one tensor for all contexts, or two for short and for long contexts.
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"

# Constants of all Llama 3.x models; only `factor` differs (8 for 3.1, 32 for 3.2).
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read_rope_scaling(
    reader: MetadataReader, theta: float, rotated: int, factors: Mapping[str, np.ndarray]
) -> dict[str, object] | None:
    """Return the `rope_scaling` of the model's config.json, or None.

    Args:
        reader: the architecture's keys.
        theta: base of the frequencies.
        rotated: rotated dimensions of a head, 2 P.
        factors: the file's tensors of RoPE factors, by name.

    Raises:
        PrecastError: the scaling cannot be converted exactly.
    """
    if LONG_FACTORS in factors or SHORT_FACTORS in factors:
        return _longrope(reader, rotated, factors)
    if (attention := reader.number("rope.scaling.attn_factor", 1.0)) != 1.0:
        raise reader.unexpected(
            "rope.scaling.attn_factor", f"1 in a file without the tensor {LONG_FACTORS}", attention
        )
    stated = _stated(reader)
    divisors = factors.get(ROPE_FACTORS)
    recovered = None if divisors is None else _recover_llama3(reader, theta, rotated, divisors)
    if recovered is not None and stated is not None:
        raise reader.unexpected(
            "rope.scaling.factor", f"1 in a file with the tensor {ROPE_FACTORS}", stated["factor"]
        )
    return recovered or stated


def _stated(reader: MetadataReader) -> dict[str, object] | None:
    """Return the scaling in the metadata. As in llama.cpp, a factor without a type means linear scaling."""
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
    """Return the Llama 3 scaling that results in `factors`, or None if all factors are 1.

    llama.cpp's converter stores the scaling as one divisor per frequency. This function computes the divisors from the
    published constants, and refuses a file with other divisors.
    """
    factor = float(factors.max())
    if factor == 1.0 and float(factors.min()) == 1.0:
        return None
    expected = llama3_divisors(theta, rotated, factor)
    # The tolerance covers the converter's float32 arithmetic; other constants differ far more.
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0.0):
        raise PrecastError(
            f"{reader.path}: expected the RoPE factors of Llama 3.x ({ROPE_FACTORS}), found other factors, which"
            " cannot be converted exactly; use the model's Hugging Face checkpoint."
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def llama3_divisors(theta: float, rotated: int, factor: float) -> np.ndarray:
    """Return the divisor of each RoPE frequency in Llama 3.x, ``[P]`` float64.

    Frequencies with wavelengths above ``original / low`` are divided by `factor`, those below ``original / high`` are
    kept, and those in between are interpolated linearly. Source: `_compute_llama3_parameters` of transformers.
    """
    frequencies = theta ** -(np.arange(0, rotated, 2) / rotated)
    rotations = _LLAMA3["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    blend = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / factor + blend)


# --- longrope (Phi 3) ---------------------------------------------------------------------------------------


def _longrope(reader: MetadataReader, rotated: int, factors: Mapping[str, np.ndarray]) -> dict[str, object]:
    """Return the `rope_scaling` of LongRoPE (Ding et al. 2024); check the attention factor in the file."""
    for name in (LONG_FACTORS, SHORT_FACTORS):
        if name not in factors or factors[name].shape != (rotated // 2,):
            found = list(factors[name].shape) if name in factors else "none"
            raise PrecastError(
                f"{reader.path}: expected {rotated // 2} RoPE factors in the tensor {name}, found {found};"
                " convert the model again."
            )
    if (kind := reader.get("rope.scaling.type", "longrope")) != "longrope":
        raise reader.unexpected(
            "rope.scaling.type", f"longrope in a file with the tensor {LONG_FACTORS}", kind
        )
    if (factor := reader.number("rope.scaling.factor", 1.0)) not in (0.0, 1.0):
        raise reader.unexpected("rope.scaling.factor", f"1 in a file with the tensor {LONG_FACTORS}", factor)
    _check_attention_factor(reader)
    return {
        "rope_type": "longrope",
        "long_factor": _shortest(factors[LONG_FACTORS]),
        "short_factor": _shortest(factors[SHORT_FACTORS]),
    }


def _shortest(factors: np.ndarray) -> list[float]:
    """Return each float32 as the shortest decimal that rounds to it: 1.1, not 1.10000002."""
    return [float(str(value)) for value in factors]


def _check_attention_factor(reader: MetadataReader) -> None:
    """Check that the attention factor is the one that transformers computes from the context lengths."""
    original = reader.integer("rope.scaling.original_context_length", least=2)  # log(1) would divide by zero
    stretch = reader.integer("context_length") / original
    implied = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    stated = reader.number("rope.scaling.attn_factor", 1.0)
    if not math.isclose(stated, implied, rel_tol=1e-6):
        raise reader.unexpected(
            "rope.scaling.attn_factor", f"{implied:.6g} (as the context lengths imply)", stated
        )
