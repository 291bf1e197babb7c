"""A checkpoint's tensors under the module's names: split, transposed, scaled and renamed; and refusals."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from precast.exporter.block_formats import BLOCK_FORMATS
from precast.exporter.models.parameters import abstract_model, unknown_sources
from precast.exporter.models.registry import ModelSpec, read_model
from precast.exporter.sources.base import QuantisedBlocks, Source, SourceTensor
from precast.loaders.artifact.errors import PrecastError

SIZES: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 16,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 10, "n_positions": 8, "n_inner": 24}
MIXTURE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}

Shapes = dict[str, tuple[int, ...]]


def _spec(model_type: str, **changes: Any) -> ModelSpec:
    sizes = GPT2 if model_type == "gpt2" else SIZES
    return read_model({"model_type": model_type, **sizes, **changes}, "c")


class Checkpoint:
    """Random tensors that count how often each is read."""

    def __init__(self, shapes: Shapes) -> None:
        rng = np.random.default_rng(0)
        self.arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in sorted(shapes.items())}
        self.reads = dict.fromkeys(shapes, 0)
        self.tensors = {name: self._tensor(name) for name in shapes}

    def _tensor(self, name: str) -> SourceTensor:
        def read() -> np.ndarray:
            self.reads[name] += 1
            return self.arrays[name].copy()

        return SourceTensor(shape=self.arrays[name].shape, dtype="float32", read=read)

    def adapted(self, spec: ModelSpec) -> Mapping[str, SourceTensor]:
        return spec.adapt(_source(self.tensors)).tensors


def _source(tensors: Mapping[str, SourceTensor]) -> Source:
    return Source(
        name="tiny",
        config={},
        tensors=tensors,
        tokenizer_json=b"",
        chat_template=None,
        bos_token=None,
        eos_token=None,
        eos_token_ids=(),
        sampling={},
        licence=None,
        files=(),
    )


def _own_shapes(spec: ModelSpec) -> Shapes:
    """Return the shape of every tensor that fits the module without adaptation."""
    return {s: p.source_shape for p in abstract_model(spec).parameters for s in p.sources}


def _fits(spec: ModelSpec, tensors: Mapping[str, SourceTensor]) -> bool:
    """Return True if every parameter has all of its source tensors, and no tensor is left over."""
    parameters = abstract_model(spec).parameters
    shapes = all(
        tensors[s].shape == p.source_shape == tensors[s].read().shape for p in parameters for s in p.sources
    )
    return shapes and not unknown_sources(parameters, tensors)


def _phi3_shapes(spec: ModelSpec) -> Shapes:
    shapes = _own_shapes(spec)
    for i in range(2):
        attn, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        for part in (f"{attn}q_proj", f"{attn}k_proj", f"{attn}v_proj", f"{mlp}gate_proj", f"{mlp}up_proj"):
            del shapes[f"{part}.weight"]
        shapes |= {f"{attn}qkv_proj.weight": (128, 64), f"{mlp}gate_up_proj.weight": (64, 64)}
    return shapes


def _gpt2_shapes(prefix: str) -> Shapes:
    shapes: Shapes = {f"{prefix}wte.weight": (10, 16), f"{prefix}wpe.weight": (8, 16)}
    shapes |= {f"{prefix}ln_f.weight": (16,), f"{prefix}ln_f.bias": (16,)}
    matrices = {
        "attn.c_attn": (16, 48),
        "attn.c_proj": (16, 16),
        "mlp.c_fc": (16, 24),
        "mlp.c_proj": (24, 16),
    }
    for layer in (f"{prefix}h.0.", f"{prefix}h.1."):
        shapes |= {f"{layer}{n}.{kind}": (16,) for n in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        shapes |= {f"{layer}{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {f"{layer}{name}.bias": shape[1:] for name, shape in matrices.items()}
    return shapes


def _mixtral_shapes() -> Shapes:
    def renamed(name: str) -> str:
        new = name.replace(".mlp.", ".block_sparse_moe.")
        for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            new = new.replace(ours, theirs) if ".experts." in name else new
        return new

    return {renamed(name): shape for name, shape in _own_shapes(_spec("mixtral")).items()}


def _fused_shapes(spec: ModelSpec) -> Shapes:
    c = spec.config
    shapes = {n: s for n, s in _own_shapes(spec).items() if ".experts." not in n}
    for i in range(2):
        prefix = f"model.layers.{i}.mlp.experts."
        shapes[f"{prefix}gate_up_proj"] = (c.mixture.experts, 2 * c.ff_width, c.width)
        shapes[f"{prefix}down_proj"] = (c.mixture.experts, c.width, c.ff_width)
    return shapes


# --- Phi-3 --------------------------------------------------------------------------------------------------


def test_fused_projections_are_split() -> None:
    spec = _spec("phi3")
    checkpoint = Checkpoint(_phi3_shapes(spec))
    tensors = checkpoint.adapted(spec)
    assert not any(checkpoint.reads.values())
    assert _fits(spec, tensors)
    fused = checkpoint.arrays["model.layers.1.self_attn.qkv_proj.weight"]
    for part, rows in (("q", slice(0, 64)), ("k", slice(64, 96)), ("v", slice(96, 128))):
        read = tensors[f"model.layers.1.self_attn.{part}_proj.weight"].read()
        np.testing.assert_array_equal(read, fused[rows])
    fused = checkpoint.arrays["model.layers.0.mlp.gate_up_proj.weight"]
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.gate_proj.weight"].read(), fused[:32])
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.up_proj.weight"].read(), fused[32:])


@pytest.mark.parametrize("kind", ["q4_0", "q4_k"])
def test_blocks_are_split_with_their_rows(kind: str) -> None:
    spec, rng = _spec("phi3"), np.random.default_rng(1)
    blocks = QuantisedBlocks(
        format=kind,
        codes=rng.integers(0, 15, (128, 64)).astype(np.uint8),
        coefficients=tuple(
            rng.integers(0, 64, (128, n)).astype(dtype)
            for n, dtype in BLOCK_FORMATS[kind].coefficient_shapes(64)
        ),
    )
    name = "model.layers.0.self_attn.qkv_proj.weight"
    tensors = dict(Checkpoint(_phi3_shapes(spec)).tensors)
    tensors[name] = replace(tensors[name], block_format=kind, blocks=lambda: blocks)
    cut = spec.architecture.adapt(tensors, spec.config)["model.layers.0.self_attn.k_proj.weight"]
    assert cut.blocks is not None
    found = cut.blocks()
    assert cut.block_format == found.format == kind
    np.testing.assert_array_equal(found.codes, blocks.codes[64:96])
    for part, whole in zip(found.coefficients, blocks.coefficients, strict=True):
        np.testing.assert_array_equal(part, whole[64:96])


# --- GPT-2 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2(prefix: str) -> None:
    spec = _spec("gpt2")
    checkpoint = Checkpoint(_gpt2_shapes(prefix))
    tensors, arrays = checkpoint.adapted(spec), checkpoint.arrays
    assert _fits(spec, tensors)
    fused = arrays[f"{prefix}h.1.attn.c_attn.weight"]
    attention = "model.layers.1.self_attn."
    np.testing.assert_array_equal(tensors[f"{attention}k_proj.weight"].read(), fused[:, 16:32].T)
    bias = arrays[f"{prefix}h.1.attn.c_attn.bias"]
    np.testing.assert_array_equal(tensors[f"{attention}v_proj.bias"].read(), bias[32:])
    projection = arrays[f"{prefix}h.0.mlp.c_proj.weight"]
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.down_proj.weight"].read(), projection.T)
    assert tensors["model.layers.0.mlp.down_proj.weight"].read().flags.c_contiguous
    norm = arrays[f"{prefix}h.1.ln_2.bias"]
    np.testing.assert_array_equal(tensors["model.layers.1.post_attention_layernorm.bias"].read(), norm)


def test_tensors_that_gpt2_lacks_are_left_over_by_name() -> None:
    masks = {"h.0.attn.bias": (1, 1, 8, 8), "h.1.attn.masked_bias": ()}
    spec = _spec("gpt2")
    left = unknown_sources(
        abstract_model(spec).parameters,
        Checkpoint({**_gpt2_shapes(""), **masks, "h.0.crossattention.c_attn.weight": (3, 3)}).adapted(spec),
    )
    assert left == ["h.0.crossattention.c_attn.weight", "h.0.self_attn.bias", "h.1.self_attn.masked_bias"]


# --- Gemma, Granite -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_one_is_added_to_norms_of_gemma(model_type: str) -> None:
    spec = _spec(model_type, head_dim=8)
    checkpoint = Checkpoint(_own_shapes(spec))
    tensors = checkpoint.adapted(spec)
    assert not any(checkpoint.reads.values())
    shifted = {n for n, a in checkpoint.arrays.items() if not np.array_equal(tensors[n].read(), a)}
    assert shifted == {n for n, a in checkpoint.arrays.items() if a.ndim == 1}
    assert len(shifted) == 2 * (6 if model_type == "gemma3_text" else 4) + 1
    for name in shifted:
        np.testing.assert_array_equal(tensors[name].read(), 1 + checkpoint.arrays[name])


def test_granite_scales_the_weights_before_the_residual_sum() -> None:
    spec = _spec("granite", residual_multiplier=0.25, attention_bias=True, mlp_bias=True)
    checkpoint = Checkpoint(_own_shapes(spec))
    checkpoint.tensors = {
        n: replace(t, block_format="q4_0", blocks=lambda: None) for n, t in checkpoint.tensors.items()
    }
    tensors = checkpoint.adapted(spec)
    scaled = {n for n, a in checkpoint.arrays.items() if not np.array_equal(tensors[n].read(), a)}
    assert scaled == {n for n in tensors if "o_proj." in n or "down_proj." in n}
    assert len(scaled) == 8
    for name, tensor in tensors.items():
        assert (tensor.blocks is None) == (tensor.block_format is None) == (name in scaled)
    for name in scaled:
        np.testing.assert_array_equal(tensors[name].read(), 0.25 * checkpoint.arrays[name])


def test_granite_without_a_multiplier_is_left_alone() -> None:
    spec = _spec("granite")
    checkpoint = Checkpoint(_own_shapes(spec))
    assert checkpoint.adapted(spec) == checkpoint.tensors


# --- mixtures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_stacked_experts_are_split_and_read_once(model_type: str) -> None:
    spec = _spec(model_type, **(MIXTURE if model_type == "qwen3_moe" else {}))
    checkpoint = Checkpoint(_fused_shapes(spec))
    tensors, width = checkpoint.adapted(spec), spec.config.ff_width
    assert not any(checkpoint.reads.values())
    experts = [p for p in abstract_model(spec).parameters if ".experts." in p.name]
    read = {name: tensors[name].read() for p in experts for name in p.sources}
    fused = checkpoint.arrays["model.layers.1.mlp.experts.gate_up_proj"]
    down = checkpoint.arrays["model.layers.1.mlp.experts.down_proj"]
    for e in range(spec.config.mixture.experts):
        prefix = f"model.layers.1.mlp.experts.{e}."
        np.testing.assert_array_equal(read[f"{prefix}gate_proj.weight"], fused[e, :width])
        np.testing.assert_array_equal(read[f"{prefix}up_proj.weight"], fused[e, width:])
        np.testing.assert_array_equal(read[f"{prefix}down_proj.weight"], down[e])
    for name, count in checkpoint.reads.items():
        assert count == (2 if "gate_up" in name else 1 if name.endswith("down_proj") else 0), name
    assert _fits(spec, tensors)


def test_experts_of_mixtral_by_their_older_names() -> None:
    spec = _spec("mixtral")
    checkpoint = Checkpoint(_mixtral_shapes())
    tensors = checkpoint.adapted(spec)
    assert _fits(spec, tensors)
    old, new = "model.layers.1.block_sparse_moe.experts.5.", "model.layers.1.mlp.experts.5."
    for theirs, ours in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        read = tensors[f"{new}{ours}.weight"].read()
        np.testing.assert_array_equal(read, checkpoint.arrays[f"{old}{theirs}.weight"])


def test_separate_experts_are_unchanged() -> None:
    spec = _spec("qwen3_moe", **MIXTURE)
    checkpoint = Checkpoint(_own_shapes(spec))
    assert checkpoint.adapted(spec) == checkpoint.tensors


# --- missing tensors and wrong shapes ------------------------------------------------------------------------

_BROKEN: list[tuple[str, Callable[[ModelSpec], Shapes], str]] = [
    ("phi3", _phi3_shapes, "model.layers.1.self_attn.qkv_proj.weight"),
    ("phi3", _phi3_shapes, "model.layers.0.mlp.gate_up_proj.weight"),
    ("gpt2", lambda _: _gpt2_shapes("transformer."), "transformer.wpe.weight"),
    ("gpt2", lambda _: _gpt2_shapes(""), "h.1.attn.c_attn.weight"),
    ("gpt2", lambda _: _gpt2_shapes(""), "h.0.attn.c_attn.bias"),
    ("gpt2", lambda _: _gpt2_shapes(""), "h.0.ln_1.weight"),
    ("mixtral", lambda _: _mixtral_shapes(), "model.layers.0.block_sparse_moe.experts.7.w2.weight"),
    ("mixtral", lambda _: _mixtral_shapes(), "model.layers.1.block_sparse_moe.gate.weight"),
    ("mixtral", _fused_shapes, "model.layers.1.mlp.experts.gate_up_proj"),
    ("qwen3_moe", _fused_shapes, "model.layers.0.mlp.experts.down_proj"),
]


@pytest.mark.parametrize(("model_type", "shapes", "name"), _BROKEN)
def test_a_missing_tensor_has_the_checkpoints_name(
    model_type: str, shapes: Callable[[ModelSpec], Shapes], name: str
) -> None:
    spec = _spec(model_type, **(MIXTURE if model_type == "qwen3_moe" else {}))
    found = shapes(spec)
    del found[name]
    with pytest.raises(PrecastError) as caught:
        Checkpoint(found).adapted(spec)
    assert (
        str(caught.value)
        == f"tiny: tensor '{name}' is missing; use the config and the weights of the same model."
    )


@pytest.mark.parametrize(("model_type", "shapes", "name"), _BROKEN)
def test_a_tensor_of_another_shape_has_the_checkpoints_name(
    model_type: str, shapes: Callable[[ModelSpec], Shapes], name: str
) -> None:
    spec = _spec(model_type, **(MIXTURE if model_type == "qwen3_moe" else {}))
    found = shapes(spec)
    expected = found[name]
    found[name] = (expected[0] + 1, *expected[1:])
    with pytest.raises(PrecastError) as caught:
        Checkpoint(found).adapted(spec)
    assert str(caught.value) == (
        f"tiny: tensor '{name}' has shape {list(found[name])}, but the config requires {list(expected)}; use the"
        " config and the weights of the same model."
    )
