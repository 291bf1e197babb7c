"""Recording the steps of layers, and refusing layers that cannot be recorded."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from precast.exporter.models.ops import ExpertsCall, LayerOps, LayerStack, LinearCall, NormCall, PackedWeight
from precast.exporter.models.steps import Steps, record

SHAPE = (2, 3, 10)  # [R, T, D]
HEADS = (4, 2, 5)  # N, K, H


def call(*outs: int, size: int = 10, **around: Any) -> LinearCall:
    return LinearCall(weights=tuple(jnp.zeros((2, out, size)) for out in outs), outs=outs, **around)


def stack(layer: Callable[[Any, LayerOps], Any], heads: tuple[int, int, int] = HEADS) -> LayerStack:
    return LayerStack(layer=layer, heads=heads, scale=0.25, soft_cap=7.0, windows=(0, 4), ropes=(0, 0))


def attention(x: Any, ops: LayerOps) -> Any:
    """Return ``x + attention(x)``."""
    (n, k, h), flat = HEADS, x.reshape(-1, x.shape[-1])
    q, keys, values = ops.project(flat, call(n * h, k * h, k * h, norm=jnp.ones((2, 10)), eps=1e-5))
    out = ops.attend(*(a.reshape(2, 3, -1, h) for a in (q, keys, values)))
    return ops.project(out.reshape(6, n * h), call(10, size=20, residual=flat))[0].reshape(2, 3, 10)


def test_a_layer_is_recorded() -> None:
    def layer(x: Any, ops: LayerOps) -> Any:
        x = attention(x, ops)
        biases = (jnp.zeros((2, 7)), jnp.zeros((2, 7)))
        gated = ops.project(x.reshape(6, 10), call(7, 7, biases=biases, gate="gelu_tanh"))
        assert [y.shape for y in gated] == [(6, 7)]
        return ops.project(gated[0], call(10, size=7, residual=x.reshape(6, -1)))[0].reshape(*x.shape)

    steps = record(stack(layer), SHAPE)
    assert steps.codes == (
        *(0, 0, -1, 1, 0, 0, 3, 0),  # values 1, 2 and 3: q, k and v of value 0
        *(1, 1, 2, 3, 0, 0, 0, 0),  # 4
        *(0, 4, 0, 0, 0, 0, 1, 0),  # 5: and value 0 added
        *(0, 5, -1, 0, 1, 2, 2, 0),  # 6: gated
        *(0, 6, 5, 0, 0, 0, 1, 0),  # 7
    )
    assert steps.outs == (20, 10, 10, 10, 7, 7, 10)
    assert steps.numbers == (1e-5, 0.0, 0.25, 7.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert [len(c.weights) for c in steps.calls if isinstance(c, LinearCall)] == [3, 1, 2, 1]


def test_norms_and_experts_are_recorded() -> None:
    norm = NormCall(weight=jnp.zeros((2, 5)), eps=1e-6, width=5)
    layer_norm = NormCall(weight=jnp.zeros((2, 10)), bias=jnp.zeros((2, 10)), eps=1e-5, width=10)
    matrices = {name: jnp.zeros((6, 4, 10)) for name in ("gate", "up")} | {"down": jnp.zeros((6, 10, 4))}

    def layer(x: Any, ops: LayerOps) -> Any:
        flat = x.reshape(6, 10)
        normed = ops.normalize(flat, norm)  # 1
        scores = ops.project(normed, call(3))[0]  # 2
        mixture = ExpertsCall(
            **matrices,
            experts=3,
            ff_width=4,
            experts_per_token=2,
            renormalised=True,
            activation="gelu_tanh",
            norm=jnp.zeros((2, 10)),
            eps=1e-3,
            residual=flat,
        )
        mixed = ops.mix(normed, scores, mixture)  # 3
        return ops.normalize(mixed, replace(layer_norm, residual=flat)).reshape(*x.shape)  # 4

    steps = record(stack(layer), SHAPE)
    assert steps.codes == (
        *(2, 0, -1, 5, 0, 0, 0, 0),
        *(0, 1, -1, 0, 0, 0, 1, 0),
        *(3, 1, 2, 0, 1, 2, 3, 2),
        *(2, 3, 0, 10, 1, 0, 0, 0),
    )
    assert steps.outs == (3, 4)
    assert steps.numbers == (1e-6, 0.0, 0.0, 0.0, 1e-3, 1.0, 1e-5, 0.0)


def test_layers_of_one_window_share_a_cache() -> None:
    found = LayerStack(layer=attention, heads=HEADS, scale=1.0, windows=(8, 0, 8, 8, 0), ropes=(0,) * 5)
    assert found.cache_windows == (0, 8)
    assert found.cache_places == ((1, 0), (0, 0), (1, 1), (1, 2), (0, 1))


def test_every_architecture_is_recorded() -> None:
    """For every architecture, one call of the kernels runs all layers."""
    import jax

    from precast.exporter.models.parameters import abstract_model
    from precast.exporter.models.registry import ARCHITECTURES, read_model

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 9}
    gpt2 = {"n_embd": 12, "n_layer": 2, "n_head": 2, "vocab_size": 9}
    for model_type in ARCHITECTURES:
        given = gpt2 if model_type == "gpt2" else sizes
        spec = read_model({"model_type": model_type, **given}, "config.json")
        model = abstract_model(spec)
        found: list[Steps] = []

        def trace(*weights: Any, model: Any = model, found: list[Steps] = found) -> Any:
            found.append(record(model.bind(weights).stack(), (1, 5, 12)))
            return 0

        jax.eval_shape(trace, *(jax.ShapeDtypeStruct(p.shape, "float32") for p in model.parameters))
        assert found[0].codes[::8].count(1) == 1  # attention


def test_packed_weights_are_passed_through() -> None:
    packed = PackedWeight(jnp.zeros((2, 1, 16, 16, 2), jnp.int8), jnp.zeros((2, 1, 1, 16), jnp.float16))
    steps = record(
        stack(lambda x, ops: ops.project(x, LinearCall(weights=(packed,), outs=(10,)))[0]), (6, 10)
    )
    (found,) = steps.calls
    assert isinstance(found, LinearCall)
    assert found.weights[0] is packed


def after(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return a layer that changes a value between its steps with another operation."""

    def layer(x: Any, ops: LayerOps) -> Any:
        x = change(attention(x, ops))
        return ops.project(x.reshape(6, 10), call(10))[0].reshape(2, 3, 10)

    return layer


OTHER = {
    "a sum": lambda x: x + x,
    "a sum with a number": lambda x: 1.0 + x,
    "a product": lambda x: x * 2.0,
    "a difference": lambda x: -x,
    "a matrix product": lambda x: x @ jnp.ones((10, 10)),
    "an array's sum": lambda x: jnp.ones(SHAPE) + x,
    "an array's product": lambda x: np.float32(2) * x,
    "a function": jnp.tanh,
    "a slice": lambda x: x[:, :, ::-1],
    "a concatenation": lambda x: jnp.concatenate([x, x]),
    "a transposition": lambda x: jnp.swapaxes(x, 0, 1),
    "a loop": lambda x: [row for row in x],
    "a size that does not fit": lambda x: x.reshape(2, 3, 11),
    "a size that does not divide": lambda x: x.reshape(-1, 7),
}


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER.keys())
def test_anything_else_is_refused(change: Callable[[Any], Any]) -> None:
    record(stack(after(lambda x: x)), SHAPE)
    with pytest.raises(TypeError):
        record(stack(after(change)), SHAPE)


LAST = "a layer must return the result of its last step"


@pytest.mark.parametrize(
    "layer",
    [
        lambda x, ops: jnp.ones(SHAPE),
        lambda x, ops: ops.project(x, call(10))[0] and x,
        lambda x, ops: ops.project(x, call(10, 10))[0],
        lambda x, ops: ops.project(x, call(11))[0],
        lambda x, ops: ops.project(x, call(10)),
    ],
    ids=["an array", "not the last step's", "not the last result", "another width", "a list"],
)
def test_the_result_must_be_the_last_steps(layer: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=LAST):
        record(stack(layer), SHAPE)


def test_the_shape_of_the_heads_comes_from_the_stack() -> None:
    """The kernel reads the shape from the stack, so a layer that gives its values other shapes is refused."""
    with pytest.raises(TypeError, match=r"expected attention heads \(2, 2, 10\), found "):
        record(stack(attention, (2, 2, 10)), SHAPE)


def test_a_foreign_value_is_refused() -> None:
    with pytest.raises(TypeError, match="takes only the layer's input"):
        record(stack(lambda x, ops: ops.project(x, call(10, residual=jnp.ones((6, 10))))[0]), SHAPE)
