"""The layer of a test's decoder as `LayerStack` takes it, with its weights."""

from functools import cache as memoised
from itertools import cycle, islice
from typing import Any

import numpy as np
from layers_cases import Case
from packed import mixed

from precast.exporter.block_formats import BLOCK_FORMATS
from precast.exporter.block_quantise import encode
from precast.exporter.quantize import FORMATS

MIXED = "mixed"


def matrices(case: Case) -> dict[str, tuple[int, int]]:
    """Return the outputs and inputs of each weight of a layer."""
    (n, k, h), d = case.heads, case.width
    shapes = {"q": (n * h, d), "k": (k * h, d), "v": (k * h, d), "o": (d, n * h)}
    shapes |= {"gate": (case.ff, d), "up": (case.ff, d), "down": (d, case.ff)}
    return shapes | ({"router": (case.experts[0], d)} if case.mlp == "experts" else {})


def norms(case: Case) -> dict[str, int]:
    (n, k, h), d = case.heads, case.width
    whole = case.heads_normed == "all"
    around = {"norm": d, "norm2": d, "after": d, "after2": d}
    return around | {"q norm": n * h if whole else h, "k norm": k * h if whole else h}


def stored(stack: np.ndarray, name: str) -> Any:
    """Return a stack ``[L, out, in]`` as the operations take it; `MIXED`: each matrix in another block format."""
    from precast.exporter.models.ops import MixedWeight, PackedWeight

    if name == MIXED:
        kinds = tuple(islice(cycle(BLOCK_FORMATS), len(stack)))
        records = [encode(BLOCK_FORMATS[kind], matrix) for kind, matrix in zip(kinds, stack, strict=True)]
        values, table = mixed(kinds, records)
        _, outs, inputs = stack.shape
        return MixedWeight(values=values, table=table, formats=kinds, outs=outs, inputs=inputs)
    encoded = [FORMATS[name].encode(matrix) for matrix in stack]
    arrays = [np.stack(parts) for parts in zip(*encoded, strict=True)]
    return arrays[0] if len(arrays) == 1 else PackedWeight(*arrays)


@memoised
def weights_of(case: Case, name: str) -> dict[str, Any]:
    """Return norms, biases and stored weights; the router's weights are float32."""
    rng, found = np.random.default_rng(case.width), {}
    for key, (out, size) in matrices(case).items():
        each = case.experts[0] if key in ("gate", "up", "down") else 1
        stack = rng.standard_normal((case.layers * each, out, size), dtype=np.float32) / np.float32(size**0.5)
        found[key] = stored(stack, "float32" if key == "router" else name)
        if case.biased:
            found[key + ".bias"] = rng.standard_normal((case.layers, out), dtype=np.float32) / 4
    for key, width in norms(case).items():
        found[key] = 1 + rng.standard_normal((case.layers, width), dtype=np.float32) / 4
    for key, width in norms(case).items():
        found[key + ".bias"] = rng.standard_normal((case.layers, width), dtype=np.float32) / 4
    return found


class Layer:
    """A decoder's layer as `LayerStack` takes it."""

    def __init__(self, case: Case, weights: dict[str, Any]) -> None:
        self.case, self.weights = case, weights

    def linear(self, *keys: str, **around: Any) -> Any:
        from precast.exporter.models.ops import LinearCall

        return LinearCall(
            weights=tuple(self.weights[key] for key in keys),
            outs=tuple(matrices(self.case)[key][0] for key in keys),
            biases=tuple(self.weights[key + ".bias"] for key in keys) if self.case.biased else (),
            **around,
        )

    def norm(self, key: str, *, bias: bool = False, residual: Any = None) -> Any:
        from precast.exporter.models.ops import NormCall

        weight, width = self.weights[key], norms(self.case)[key]
        added = self.weights[key + ".bias"] if bias else None
        return NormCall(weight=weight, eps=1e-5, width=width, bias=added, residual=residual)

    def before(self, x: Any, key: str, calls: Any) -> tuple[Any, dict[str, Any]]:
        """x as the next product takes it, and the norm it does itself."""
        if self.case.norms == "layer":
            return calls.normalize(x, self.norm(key, bias=True)), {}
        return x, {"norm": self.weights[key], "eps": 1e-6}

    def after(self, x: Any, product: str, norm: str, residual: Any, calls: Any) -> Any:
        if self.case.norms != "around":
            return calls.project(x, self.linear(product, residual=residual))[0]
        return calls.normalize(calls.project(x, self.linear(product))[0], self.norm(norm, residual=residual))

    def attention(self, x: Any, tokens: tuple[int, ...], calls: Any) -> Any:
        (n, _, h), given = self.case.heads, self.before(x, "norm", calls)
        q, k, v = calls.project(given[0], self.linear("q", "k", "v", **given[1]))
        if self.case.heads_normed:
            q, k = (calls.normalize(a, self.norm(key)) for a, key in ((q, "q norm"), (k, "k norm")))
        out = calls.attend(*(a.reshape(*tokens, -1, h) for a in (q, k, v))).reshape(-1, n * h)
        return self.after(out, "o", "after", x, calls)

    def mixture(self, x: Any, calls: Any) -> Any:
        from precast.exporter.models.ops import ExpertsCall

        given, how = self.before(x, "norm2", calls)
        (scores,) = calls.project(given, self.linear("router", **how))
        (experts, chosen, renormalised), w = self.case.experts, self.weights
        call = ExpertsCall(
            **{key: w[key] for key in ("gate", "up", "down")},
            experts=experts,
            ff_width=self.case.ff,
            experts_per_token=chosen,
            renormalised=renormalised,
            activation=self.case.gate,
            residual=None if not self.case.attends else x,
            **how,
        )
        return calls.mix(given, scores, call)

    def __call__(self, x: Any, calls: Any) -> Any:
        flat = x.reshape(-1, self.case.width)
        if self.case.attends:
            flat = self.attention(flat, x.shape[:2], calls)
        if self.case.mlp == "experts":
            return self.mixture(flat, calls).reshape(*x.shape)
        given, how = self.before(flat, "norm2", calls)
        keys = ("gate", "up") if self.case.mlp == "gated" else ("up",)
        (gated,) = calls.project(given, self.linear(*keys, gate=self.case.gate, **how))
        return self.after(gated, "down", "after2", flat, calls).reshape(*x.shape)
