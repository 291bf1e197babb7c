"""Round weights to int4 to minimise the error of a product's outputs, instead of the error of the weights.

GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323) rounds a matrix column by column. After each column, it
changes the columns that are not yet rounded, to compensate for the error in the outputs. The Gram matrix of the inputs
determines the best compensation.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .quantize import GROUP, INT4
from .scales import INT4_LEVELS, fit_with_minimum, near_half

# This fraction of the diagonal's mean is added to the diagonal of the Gram matrix, to make it positive definite.
_DAMPING = 0.01


def quantise(matrix: np.ndarray, triangle: np.ndarray) -> tuple[np.ndarray, ...]:
    """Quantise a matrix to int4.

    Args:
        matrix: float32 ``[out, in]``; it is overwritten.
        triangle: the result of `compensation` for the matrix's inputs.

    Returns:
        The arrays of the format int4, as `Format.encode` returns them.
    """
    outs, inputs = matrix.shape
    groups = -(-inputs // GROUP)
    values = np.empty((outs, inputs), np.uint8)
    scale, minimum = (np.empty((outs, groups), np.float16) for _ in range(2))
    for group in range(groups):
        columns = slice(group * GROUP, min((group + 1) * GROUP, inputs))
        own, later = triangle[columns, columns], triangle[columns, columns.stop :]
        part = np.ascontiguousarray(matrix[:, columns].T)
        importance = np.broadcast_to(1 / np.diag(own)[:, None] ** 2, part.shape)
        found = fit_with_minimum(part, INT4_LEVELS, importance)
        scale[:, group], minimum[:, group] = map(near_half, found)
        rounded, errors = _round_group(part, own, scale[:, group], minimum[:, group])
        values[:, columns] = rounded.T
        matrix[:, columns.stop :] -= errors.T @ later
    return INT4.pack(values, scale, minimum)


def _round_group(
    part: np.ndarray, triangle: np.ndarray, scale: np.ndarray, minimum: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Round the n columns of a group ``[n, out]`` one by one; return the values and the scaled errors of each."""
    step, low = scale.astype(np.float32), minimum.astype(np.float32)
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step != 0)
    values = np.empty(part.shape, np.uint8)
    errors = np.empty_like(part)
    for i, column in enumerate(part):
        rounded = np.clip(np.rint((column - low) * inverse), 0, INT4_LEVELS)
        values[i] = rounded
        errors[i] = (column - (rounded * step + low)) / triangle[i, i]
        part[i + 1 :] -= triangle[i, i + 1 :, None] * errors[i]
    return values, errors


def compensation(gram: Array) -> np.ndarray:
    """Return the upper triangular matrix U with UᵀU = H⁻¹, where H is the Gram matrix with a damped diagonal.

    Args:
        gram: sum over the calibration's tokens of x xᵀ for inputs x ``[in]``, float32 ``[in, in]``.
    """
    diagonal = jnp.diag(gram)
    # An input that is always zero gets a positive diagonal entry, because the matrix would otherwise have no inverse.
    raised = jnp.where(diagonal > 0, 0.0, 1.0) + _DAMPING * jnp.mean(diagonal)
    # Reversing the order of the inputs turns the lower triangle of the factor's inverse into an upper one.
    lower = jnp.linalg.cholesky((gram + jnp.diag(raised))[::-1, ::-1])
    inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(lower)), lower=True)
    return np.ascontiguousarray(inverse[::-1, ::-1])
