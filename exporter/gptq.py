"""Round weights to minimise the error of a product's outputs, instead of the error of the weights.

GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323) rounds a matrix column by column. After each column, it
changes the columns that are not yet rounded, to compensate for the error in the outputs. The Gram matrix of the inputs
determines the best compensation.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .block_formats import GROUP, SUPER, BlockFormat
from .block_quantise import Coefficients, code_type, codes_of, effective, fit, fit_factors, grid
from .scales import inverse

# This fraction of the diagonal's mean is added to the diagonal of the Gram matrix, to make it positive definite.
_DAMPING = 0.01


def quantise(matrix: np.ndarray, triangle: np.ndarray, block_format: BlockFormat) -> tuple[np.ndarray, ...]:
    """Quantise a matrix to a block format.

    Rounding a column changes all later columns. The factors of a super-group are therefore fitted just before its first
    column is rounded, and the other coefficients of a group just before the group's first column is rounded.

    Args:
        matrix: float32 ``[out, in]``; it is overwritten.
        triangle: the result of `compensation` for the matrix's inputs.
        block_format: the format.

    Returns:
        The codes ``[out, in]`` and the coefficients, in the form that `BlockFormat.pack` expects.
    """
    inputs = matrix.shape[1]
    importance = 1 / np.diag(triangle) ** 2
    codes = np.empty(matrix.shape, code_type(block_format))
    parts: list[tuple[np.ndarray, ...]] = []
    shared: list[tuple[np.ndarray, ...]] = []
    # New memory for the products of every group would cost a page fault every 4 KB.
    products = np.empty(matrix.size, np.float32)
    for start in range(0, inputs, GROUP):
        if start % (GROUP * SUPER) == 0:
            whole = slice(start, start + GROUP * SUPER)
            shared.append(fit_factors(block_format, matrix[:, whole], importance[whole]))
        columns = slice(start, min(start + GROUP, inputs))
        own, later = triangle[columns, columns], triangle[columns, columns.stop :]
        found = fit(block_format, matrix[:, columns], importance[columns], shared[-1])
        parts.append(found[len(shared[-1]) :])
        codes[:, columns], errors = _round_group(block_format, matrix[:, columns], own, found)
        left = matrix[:, columns.stop :]
        left -= np.matmul(errors.T, later, out=products[: left.size].reshape(left.shape))
    return codes, *(
        np.concatenate(pieces, axis=1)
        for all_pieces in (shared, parts)
        for pieces in zip(*all_pieces, strict=True)
    )


def _round_group(
    block_format: BlockFormat, block: np.ndarray, triangle: np.ndarray, coefficients: Coefficients
) -> tuple[np.ndarray, np.ndarray]:
    """Round the n columns of a group ``[out, n]`` one by one.

    Returns:
        The codes ``[out, n]``, and each column's error divided by its diagonal entry of `triangle`, ``[n, out]``.
    """
    columns = np.ascontiguousarray(block.T)
    scale, minimum = effective(block_format, coefficients)
    numbers = grid(block_format)
    if minimum is None:
        minimum = np.zeros_like(scale)
    reciprocal = inverse(scale)
    integers, errors = np.empty_like(columns), np.empty_like(columns)
    for i, column in enumerate(columns):
        run = i * block_format.runs // GROUP
        low = minimum[:, run]
        integers[i] = numbers.nearest((column - low) * reciprocal[:, run])
        errors[i] = (column - (integers[i] * scale[:, run] + low)) / triangle[i, i]
        columns[i + 1 :] -= triangle[i, i + 1 :, None] * errors[i]
    return codes_of(block_format, integers.T), errors


def compensation(gram: Array) -> np.ndarray:
    """Return the upper triangular matrix U with UᵀU = H⁻¹, where H is the Gram matrix with a damped diagonal.

    Args:
        gram: the sum of x xᵀ over the inputs x ``[in]`` at all tokens of the text, float32 ``[in, in]``.
    """
    diagonal = jnp.diag(gram)
    # An input that is always zero gets a positive diagonal entry, because the matrix would otherwise have no inverse.
    raised = jnp.where(diagonal > 0, 0.0, 1.0) + _DAMPING * jnp.mean(diagonal)
    # The inverse of a Cholesky factor is lower triangular. Reversing the order of the inputs makes it upper triangular.
    lower = jnp.linalg.cholesky((gram + jnp.diag(raised))[::-1, ::-1])
    inverted = jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(lower)), lower=True)
    return np.ascontiguousarray(inverted[::-1, ::-1])
