"""Print a digest of the kernels' answers on a number of CPUs: `python digest.py 1`.

A separate program, because XLA counts the usable CPUs once, when it is loaded.
"""

import hashlib
import os
import sys
from typing import Any

import ml_dtypes
import numpy as np

ATTENTION = {"scale": np.float32(0.1), "window": np.int64(0), "soft_cap": np.float32(9)}
LINEAR = {"norm": True, "eps": np.float32(1e-5), "residual": False, "bias": False, "gate": ""}
STEPS = (
    *(0, 0, -1, 1, 0, 0, 3, 0),
    *(1, 1, 2, 3, 0, 0, 0, 0),
    *(0, 4, 0, 0, 0, 0, 1, 0),
    *(0, 5, -1, 1, 0, 1, 2, 0),
    *(0, 6, 5, 0, 0, 0, 1, 0),
    *(2, 7, 7, 200, 1, 0, 0, 0),
    *(0, 8, -1, 0, 0, 0, 1, 0),
    *(3, 8, 9, 8, 1, 1, 6, 2),
)
LAYERS = {
    "heads": np.int64([2, 1, 60]),
    "windows": np.int64([0, 100, 0]),
    "ropes": np.int64([1, 0, 1]),
    "steps": np.int64(STEPS),
    "outs": np.int64([120, 60, 60, 200, 300, 300, 200, 6, 150]),
    "numbers": np.float32([1e-5, 0, 0.1, 0, 0, 0, 1e-5, 0, 0, 0, 1e-5, 0, 0, 0, 1e-5, 1]),
}


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def call(
    name: str,
    *arguments: np.ndarray,
    results: list[np.ndarray],
    aliases: dict[int, int] | None = None,
    attributes: dict[str, Any],
) -> list[np.ndarray]:
    import jax

    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in results]
    target = jax.ffi.ffi_call(name, shapes, input_output_aliases=aliases or {})
    return [np.asarray(y) for y in jax.jit(lambda *a: target(*a, **attributes))(*arguments)]


def weights(rng: np.random.Generator, name: str, layers: int, outs: int, size: int) -> list[np.ndarray]:
    from precast.exporter.quantize import FORMATS

    encoded = [FORMATS[name].encode(normal(rng, outs, size) / np.float32(size**0.5)) for _ in range(layers)]
    return [np.stack(arrays) for arrays in zip(*encoded, strict=True)]


def layers(rng: np.random.Generator, name: str) -> list[np.ndarray]:
    """Return the answers of a chunk and a step through three layers of width 200.

    Two heads of 60 share one key/value head. The second layer sees a hundred positions. Each layer ends with a norm and
    a mixture of two of six experts.
    """
    found = []
    caches = [
        np.zeros((n, 2, 1, size, 60), np.float32) for n, size in ((2, 300), (2, 300), (1, 359), (1, 359))
    ]
    shapes = ((120, 200), (60, 200), (60, 200), (200, 120), (300, 200), (300, 200), (200, 300))
    q, k, v, o, gate, up, down = (weights(rng, name, 3, *shape) for shape in shapes)
    operands = [normal(rng, 3, 200), *q, *k, *v, *o, normal(rng, 3, 200), *gate, *up, *down]
    operands += [
        normal(rng, 3, 200),
        normal(rng, 3, 200),
        *weights(rng, "float32", 3, 6, 200),
        normal(rng, 3, 200),
    ]
    operands += [a for shape in ((150, 200), (150, 200), (200, 150)) for a in weights(rng, name, 18, *shape)]
    for tokens, start in ((260, 0), (1, 260)):
        x, angles = normal(rng, 2 * tokens, 200), normal(rng, 2, 2, tokens, 30)
        rows = [np.int32(row) for row in ((1, 0), (start, start), (tokens, 1))]
        y, *caches = call(
            "precast.layers.v2",
            *(x, np.int32(len(x)), np.cos(angles), np.sin(angles), *caches, *rows, *operands),
            results=[x, *caches],
            aliases={4 + i: 1 + i for i in range(4)},
            attributes=LAYERS,
        )
        found += [y, *caches]
    return found


def linear(rng: np.random.Generator, name: str) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    first, second = weights(rng, name, 2, 513, 801), weights(rng, name, 2, 513, 801)
    # Some products are subnormal: every thread must treat them the same.
    for rows, tiny in ((1, 1.0), (3, 1.0), (7, 1.0), (33, 1.0), (90, 1.0), (5, 1e-38)):
        x = normal(rng, rows, 801) * np.float32(tiny)
        given, y = (x, np.int32(1), np.int32(rows), normal(rng, 2, 801)), np.zeros((rows, 513), np.float32)
        found += call("precast.linear.v1", *given, *first, *second, results=[y, y], attributes=LINEAR)
        gated = LINEAR | {"gate": "silu", "residual": True}
        found += call("precast.linear.v1", *given, y + 1, *first, *second, results=[y], attributes=gated)
    return found


def attention(rng: np.random.Generator, kind: Any) -> list[np.ndarray]:
    """Return the answers of a decode over several spans, prompts of several blocks, and a call too small to split."""
    found: list[np.ndarray] = []
    for starts, lengths in (((600, 257), (1, 1)), ((40, 0), (200, 117)), ((9, 3), (1, 1))):
        T = max(lengths)
        q, k, v = normal(rng, 2, T, 6, 24), normal(rng, 2, T, 2, 24), normal(rng, 2, T, 2, 24)
        caches = [(20 * normal(rng, 1, 2, 2, 700, 24)).astype(kind) for _ in range(2)]
        if kind is np.int8:
            caches += [np.abs(normal(rng, 1, 2, 2, 700)) / 40 for _ in range(2)]
        places = [np.asarray(a, np.int32) for a in (0, (1, 0), starts, lengths)]
        found += call(
            "precast.attention.v2",
            *(q, k, v, normal(rng, 2, T, 7), normal(rng, 2, T, 7), *caches, *places),
            results=[q, *caches],
            aliases={5 + i: 1 + i for i in range(len(caches))},
            attributes=ATTENTION,
        )
    return found


def answers() -> list[np.ndarray]:
    """Return the results of calls large enough for several tasks each, with the instruction set in use."""
    from precast.exporter.quantize import FORMATS

    rng = np.random.default_rng(0)
    found = [array for name in FORMATS for part in (linear, layers) for array in part(rng, name)]
    kinds = (np.float32, ml_dtypes.bfloat16, np.int8)
    return found + [array for kind in kinds for array in attention(rng, kind)]


def main(cpus: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
    from precast import kernels
    from precast.loaders.runtime import pjrt

    pjrt.register_kernels()
    for isa in kernels.supported_isas():
        kernels.force_isa(isa)
        digest = hashlib.sha256(b"".join(a.tobytes() for a in answers())).hexdigest()
        print(isa, digest)


if __name__ == "__main__":
    main(int(sys.argv[1]))
