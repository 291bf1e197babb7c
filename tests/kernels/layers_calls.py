"""A valid call of precast.layers: two layers, two sequences of four tokens."""

import numpy as np

F32 = np.float32


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, F32)


LAYERS_CACHE = (2, 3, 2, 9, 4)  # [L, B, K, S, H]
LAYERS_INT8 = [np.zeros(LAYERS_CACHE, np.int8)] * 2 + [ones(*LAYERS_CACHE[:-1])] * 2
LINEAR_QKV = (0, 0, -1, 1, 0, 0, 3, 0)
ATTENTION = (1, 1, 2, 3, 0, 0, 0, 0)
LINEAR_OUT = (0, 4, 0, 0, 1, 0, 1, 0)
GATED = (0, 5, -1, 0, 0, 1, 2, 0)
DOWN = (0, 6, 5, 0, 0, 0, 1, 0)
STEPS = (LINEAR_QKV, ATTENTION, LINEAR_OUT, GATED, DOWN)
OUTS = (24, 8, 8, 10, 14, 14, 10)
WEIGHTS = [
    *(ones(2, 10), ones(2, 24, 10), ones(2, 8, 10), ones(2, 8, 10)),
    *(ones(2, 10, 24), ones(2, 10), ones(2, 14, 10), ones(2, 14, 10), ones(2, 10, 14)),
]
