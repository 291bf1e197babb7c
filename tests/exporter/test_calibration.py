"""int4 weights that are rounded with the inputs of a text (GPTQ)."""

import dataclasses
import hashlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from precast.exporter import block_quantise, gptq
from precast.exporter.block_formats import BLOCK_FORMATS, BlockFormat
from precast.exporter.calibration import calibrated_parameters, quantised_matrices, read_calibration_text
from precast.exporter.models.parameters import abstract_model
from precast.exporter.models.registry import read_model
from precast.exporter.options import ExportOptions
from precast.exporter.plan import make_plan
from precast.exporter.quantize import INT4
from precast.exporter.sources.base import QuantisedBlocks
from precast.exporter.weights import formats_of
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.weights import map_weights
from precast.loaders.load import load

WORDS = "the quick brown fox jumps over the lazy dog; def fibonacci(n): return n; the cat sat on the mat. "
# Configs with additional norms in each layer: Gemma 2 has norms after attention and MLP, and Qwen 3 has norms of q and
# k.
GEMMA2 = {
    "model_type": "gemma2",
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "hidden_activation": "gelu_pytorch_tanh",
}
ARCHITECTURES = {
    "llama": ({}, ()),
    "mistral": ({"model_type": "mistral", "sliding_window": 8}, ()),
    "gemma2": (GEMMA2, ("pre_feedforward_layernorm", "post_feedforward_layernorm")),
    "qwen3": ({"model_type": "qwen3"}, ("self_attn.q_norm", "self_attn.k_norm")),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS * 60)
    return path


def correlated(rng, tokens: int, inputs: int) -> np.ndarray:
    """Return inputs of a product, ``[tokens, in]``, with most of their variance in a few directions."""
    mixed = rng.standard_normal((tokens, inputs)) @ rng.standard_normal((inputs, inputs))
    return (mixed * np.exp(rng.normal(0, 1, inputs))).astype(np.float32)


def relative_error(x: np.ndarray, matrix: np.ndarray, decoded: np.ndarray) -> float:
    """Return the error of a product's outputs as a share of their magnitude."""
    return float(np.linalg.norm(x @ (decoded - matrix).T) / np.linalg.norm(x @ matrix.T))


def calibrated(stored: BlockFormat, matrix: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Quantise a matrix for inputs with this Gram matrix; return the decoded weights."""
    records = stored.pack(*gptq.quantise(matrix.copy(), gptq.compensation(jnp.asarray(gram)), stored))
    return stored.decode(records, *matrix.shape)


# --- one matrix ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BLOCK_FORMATS if name != "e4m3"])
@pytest.mark.parametrize(("outs", "inputs"), [(1, 1), (16, 32), (20, 70), (33, 160), (5, 31), (16, 520)])
def test_outputs_lose_less_than_with_plain_rounding(name: str, outs: int, inputs: int) -> None:
    stored = BLOCK_FORMATS[name]
    rng = np.random.default_rng(inputs)
    x, matrix = correlated(rng, 400, inputs), rng.standard_normal((outs, inputs), np.float32)
    plain = stored.decode(block_quantise.encode(stored, matrix), *matrix.shape)
    found = calibrated(stored, matrix, x.T @ x)
    # The smallest matrices can be almost exact; their only errors are those of the float16 coefficients.
    most = max(relative_error(x, matrix, plain) * (0.75 if inputs >= 70 else 1.02), 2e-4)
    assert relative_error(x, matrix, found) <= most


def test_the_compensation_is_a_factor_of_the_inverse() -> None:
    x = correlated(np.random.default_rng(0), 300, 40)
    gram = x.T @ x
    upper = gptq.compensation(jnp.asarray(gram)).astype(np.float64)
    damped = gram.astype(np.float64) + 0.01 * np.diag(gram).mean() * np.eye(40)
    np.testing.assert_array_equal(upper, np.triu(upper))
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(40), atol=1e-3)


def test_inputs_that_are_always_zero() -> None:
    rng = np.random.default_rng(1)
    x, matrix = correlated(rng, 200, 64), rng.standard_normal((16, 64), np.float32)
    x[:, ::3] = 0
    for stored in (kind for kind in BLOCK_FORMATS.values() if not kind.has_float_codes):
        # The largest steps of MXFP4 are twice those of other formats, so the compensation moves weights further.
        most = 2 if stored.name == "mxfp4" else 1
        for inputs in (x, np.zeros_like(x)):
            assert np.abs(calibrated(stored, matrix, inputs.T @ inputs) - matrix).max() < most


# --- a model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "norms"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_matrix_of_the_layers_is_quantised(tiny_source, text: Path, config, norms) -> None:
    plain = tiny_source(config=config)
    width = {"self_attn": plain.config["head_dim"]}
    tensors = {
        f"model.layers.{layer}.{norm}.weight": np.ones(
            width.get(norm.partition(".")[0], plain.config["hidden_size"]), np.float32
        )
        for layer in range(plain.config["num_hidden_layers"])
        for norm in norms
    }
    source = tiny_source(config=config, tensors=tensors)
    plan = make_plan(source, ExportOptions(buckets=(8,), context=64, weights="int4"))
    found = list(quantised_matrices(plan, read_calibration_text(text), {}))
    parameters = calibrated_parameters(plan.stored.parameters, plan.stored.formats)
    assert {p.name.rpartition("layers.")[2] for p in parameters} == {
        *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    layers = plan.spec.config.layers
    assert sorted(name for name, _ in found) == sorted(p.name for p in parameters for _ in range(layers))
    for name, arrays in found:
        shape = next(p.source_shape for p in parameters if p.name == name)
        assert [a.shape for a in arrays] == [a.shape[1:] for a in INT4.arrays(shape)]


def test_experts_are_rounded_alone(tiny_source) -> None:
    config = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    parameters = abstract_model(read_model(tiny_source(config=config).config, "tiny")).parameters
    chosen = calibrated_parameters(parameters, formats_of(parameters, "int4"))
    assert {p.name.rpartition(".self_attn.")[2] for p in chosen} == {f"{name}_proj.weight" for name in "qkvo"}


def test_a_calibrated_artifact_is_closer_to_the_model(export_tiny, text: Path) -> None:
    """The rounding suits the calibration text, so its logits have smaller errors. It is deterministic."""
    roots = [
        export_tiny(weights=weights, kv_cache="float32", targets=("cpu",), calibrate=given)
        for weights, given in (("float32", None), ("int4", None), ("int4", text), ("int4", text))
    ]
    exact, plain, calibrated = (logits(load(root), WORDS * 2) for root in roots[:3])
    assert np.square(calibrated - exact).mean() < 0.7 * np.square(plain - exact).mean()
    first, second = (hashlib.sha256((r / "weights.safetensors").read_bytes()).hexdigest() for r in roots[2:])
    assert first == second


def logits(model, text: str) -> np.ndarray:
    """Return the logits after each of the first tokens of a text."""
    engine, ids = model.engine, model.tokenizer.encode(text)[:60]
    cache = engine.new_cache()
    rows = []
    for start in range(0, len(ids), engine.score_tokens):
        step = engine.score(ids[start : start + engine.score_tokens], cache, start=start, slot=0)
        rows.append(engine.logits(step).copy())
    return np.concatenate(rows)


def test_blocks_keep_their_values(tiny_source, export_tiny, decode_blocks, text: Path) -> None:
    """One source matrix has minima, and another has none; all other matrices are calibrated."""
    source = tiny_source()
    rng = np.random.default_rng(0)

    def with_blocks(name: str, *, has_minima: bool):
        tensor = source.tensors[name]
        rows, columns = tensor.shape
        groups = -(-columns // 32)
        scale, minimum = (np.full((rows, groups), value, np.float16) for value in (0.01, -0.08))
        blocks = QuantisedBlocks(
            format="q4_1" if has_minima else "q4_0",
            codes=rng.integers(0, 16, (rows, columns)).astype(np.uint8),
            coefficients=(scale, minimum) if has_minima else (scale,),
        )
        return dataclasses.replace(
            tensor,
            read=lambda: decode_blocks(blocks),
            block_format=blocks.format,
            blocks=lambda: blocks,
        )

    changed = {
        f"model.layers.{layer}.mlp.{part}_proj.weight": with_blocks(
            f"model.layers.{layer}.mlp.{part}_proj.weight", has_minima=part == "up"
        )
        for layer in range(source.config["num_hidden_layers"])
        for part in ("up", "gate")
    }
    source = dataclasses.replace(source, tensors={**source.tensors, **changed})
    stored = [
        map_weights(
            export_tiny(source, weights="int4", targets=("cpu",), calibrate=given) / "weights.safetensors"
        )
        for given in (None, text)
    ]
    for part in ("mlp.up_proj", "mlp.gate_proj"):
        name = f"model.layers.{part}.weight"
        np.testing.assert_array_equal(stored[0][name], stored[1][name])
    assert "model.layers.mlp.gate_proj.weight.minimum" not in stored[1]
    other = "model.layers.mlp.down_proj.weight"
    assert (stored[0][other] != stored[1][other]).any()


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "expected a text file, but it does not exist; check the spelling."),
        (b"", "expected some text, found none; name another file."),
        (
            b"too short",
            "expected at least 64 tokens of text to calibrate with, found fewer; name a longer text.",
        ),
        (b"\xff" * 99, "expected text in UTF-8, found other bytes; convert it first."),
    ],
)
def test_unusable_texts_are_refused(
    export_tiny, tmp_path: Path, content: bytes | None, expected: str
) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PrecastError) as raised:
        export_tiny(weights="int4", calibrate=path)
    assert str(raised.value) == f"{path}: {expected}"


def test_inputs_too_large_for_float32_are_refused(tiny_source, export_tiny, text: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    large = np.full_like(tiny_source().tensors[name].read(), 1e30)
    with pytest.raises(PrecastError) as raised:
        export_tiny(tiny_source(tensors={name: large}), weights="int4", calibrate=text)
    assert str(raised.value) == (
        f"{text}: with this text, the inputs of layer 1 are too large for calibration; name another text with"
        " --calibrate, or use --weights int4 without calibration."
    )


def test_values_that_are_not_finite_are_refused(tiny_source, export_tiny, text: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    values = tiny_source().tensors[name].read()
    values[3, 2] = np.nan
    with pytest.raises(PrecastError) as raised:
        export_tiny(tiny_source(tensors={name: values}), weights="int4", calibrate=text)
    assert str(raised.value) == (
        f"{name}: the tensor contains values that are not finite numbers; fetch the checkpoint again."
    )
