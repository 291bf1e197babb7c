"""Parameters and shapes: names, stacks, and published models at full size."""

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from precast.exporter.models.parameters import AbstractModel, abstract_model, unknown_sources
from precast.exporter.models.registry import ModelSpec, read_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SMALL: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 320,
}


def _spec(config: Mapping[str, Any], **changes: Any) -> ModelSpec:
    return read_model({**config, **changes}, "config.json")


# --- parameters ---------------------------------------------------------------------------------------------


def _shapes(model: AbstractModel) -> dict[str, tuple[int, ...]]:
    return {p.name: p.shape for p in model.parameters}


def test_parameters_are_named_and_stacked() -> None:
    model = abstract_model(_spec(SMALL, head_dim=8))
    assert _shapes(model) == {
        "lm_head.weight": (1, 320, 48),
        "model.embed_tokens.weight": (320, 48),
        "model.layers.input_layernorm.weight": (2, 48),
        "model.layers.mlp.down_proj.weight": (2, 48, 80),
        "model.layers.mlp.gate_proj.weight": (2, 80, 48),
        "model.layers.mlp.up_proj.weight": (2, 80, 48),
        "model.layers.post_attention_layernorm.weight": (2, 48),
        "model.layers.self_attn.k_proj.weight": (2, 24, 48),
        "model.layers.self_attn.o_proj.weight": (2, 48, 48),
        "model.layers.self_attn.q_proj.weight": (2, 48, 48),
        "model.layers.self_attn.v_proj.weight": (2, 24, 48),
        "model.norm.weight": (1, 48),
    }
    assert [p.name for p in model.parameters] == sorted(_shapes(model))


def test_sources_are_the_checkpoints_names() -> None:
    by_name = {p.name: p for p in abstract_model(_spec(SMALL)).parameters}
    stack = by_name["model.layers.mlp.up_proj.weight"]
    assert stack.sources == ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    assert (stack.source_shape, stack.size) == ((80, 48), 2 * 80 * 48)
    for name, shape in {
        "model.embed_tokens.weight": (320, 48),
        "lm_head.weight": (320, 48),
        "model.norm.weight": (48,),
    }.items():
        assert (by_name[name].sources, by_name[name].source_shape) == ((name,), shape)


@pytest.mark.parametrize(
    ("changes", "added"),
    [
        ({"attention_bias": True}, {"q_proj": 48, "k_proj": 24, "v_proj": 24, "o_proj": 48}),
        ({"mlp_bias": True}, {"gate_proj": 80, "up_proj": 80, "down_proj": 48}),
        ({"model_type": "qwen2"}, {"q_proj": 48, "k_proj": 24, "v_proj": 24}),
    ],
)
def test_biases_are_parameters(changes: Mapping[str, Any], added: Mapping[str, int]) -> None:
    found = _shapes(abstract_model(_spec(SMALL, **changes)))
    biases = {name.split(".")[-2]: shape for name, shape in found.items() if name.endswith(".bias")}
    assert biases == {name: (2, size) for name, size in added.items()}


def test_tied_embeddings_have_no_head() -> None:
    untied, tied = (_shapes(abstract_model(_spec(SMALL, tie_word_embeddings=t))) for t in (False, True))
    assert set(untied) - set(tied) == {"lm_head.weight"}
    assert {name: shape for name, shape in untied.items() if name in tied} == tied


def test_tensors_of_no_parameter_are_found() -> None:
    parameters = abstract_model(_spec(SMALL)).parameters
    sources = [source for p in parameters for source in p.sources]
    assert len(set(sources)) == len(sources) == 3 + 9 * 2
    assert unknown_sources(parameters, dict.fromkeys(sources)) == []
    extra = dict.fromkeys([*sources, "model.layers.2.mlp.up_proj.weight", "a"])
    assert unknown_sources(parameters, extra) == ["a", "model.layers.2.mlp.up_proj.weight"]


def test_bound_weights_are_the_arrays_given() -> None:
    model = abstract_model(_spec(SMALL))
    arrays = [np.full(p.shape, i, np.float32) for i, p in enumerate(model.parameters)]
    bound = model.bind(arrays)
    places = {p.name: i for i, p in enumerate(model.parameters)}
    k_proj = bound.model.layers.self_attn.k_proj
    assert float(k_proj.weight[...].max()) == places["model.layers.self_attn.k_proj.weight"]
    assert float(bound.model.norm.weight[...].min()) == places["model.norm.weight"]


def test_too_few_arrays_are_refused() -> None:
    model = abstract_model(_spec(SMALL))
    with pytest.raises(ValueError, match="shorter"):
        model.bind([np.zeros(p.shape, np.float32) for p in model.parameters[:-1]])


# --- published models, without their weights ----------------------------------------------------------------


def _llama(**sizes: Any) -> dict[str, Any]:
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    shape = dict(zip(names, sizes.pop("shape"), strict=True))
    return {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, **shape, **sizes}


SMOLLM2 = {
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_theta": 100000,
}
LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0}
QWEN2 = {
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
}
QWEN2 |= {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 24}

# The models' config.json without keys about training, and the number of parameters that the model card states.
PUBLISHED: Mapping[str, tuple[Mapping[str, Any], int]] = {
    "SmolLM2-135M": (_llama(shape=(576, 1536, 30, 9, 3), **SMOLLM2), 134_515_008),
    "SmolLM2-360M": (_llama(shape=(960, 2560, 32, 15, 5), **SMOLLM2), 361_821_120),
    "SmolLM2-1.7B": (
        _llama(shape=(2048, 8192, 24, 32, 32), **(SMOLLM2 | {"rope_theta": 130000})),
        1_711_376_384,
    ),
    "Llama-3.2-1B": (
        _llama(
            shape=(2048, 8192, 16, 32, 8),
            **LLAMA_3,
            head_dim=64,
            attention_bias=False,
            mlp_bias=False,
            pretraining_tp=1,
            rope_scaling={**LLAMA3, "factor": 32.0},
            tie_word_embeddings=True,
        ),
        1_235_814_400,
    ),
    "Llama-3.1-8B": (
        _llama(
            shape=(4096, 14336, 32, 32, 8),
            **LLAMA_3,
            attention_bias=False,
            rope_scaling=LLAMA3,
            tie_word_embeddings=False,
        ),
        8_030_261_248,
    ),
    "Qwen2-0.5B": (
        {**_llama(shape=(896, 4864, 24, 14, 2), vocab_size=151936, tie_word_embeddings=True), **QWEN2},
        494_032_768,
    ),
    "Qwen2.5-7B": (
        {**_llama(shape=(3584, 18944, 28, 28, 4), vocab_size=152064, tie_word_embeddings=False), **QWEN2},
        7_615_616_512,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(name: str) -> None:
    config, expected = PUBLISHED[name]
    model = abstract_model(_spec(config))
    assert sum(p.size for p in model.parameters) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_run_in_the_abstract(name: str) -> None:
    """Trace the whole forward pass with abstract shapes, without allocating arrays of this size."""
    import jax

    spec = _spec(PUBLISHED[name][0])
    model = abstract_model(spec)
    table = jax.ShapeDtypeStruct((len(spec.ropes), 64, spec.ropes[0].pairs), "float32")
    tokens = jax.ShapeDtypeStruct((1, 64), "int32")
    weights = [jax.ShapeDtypeStruct(p.shape, "float32") for p in model.parameters]
    logits = jax.eval_shape(
        lambda t, c, s, *w: model.bind(w).forward(t, c, s), tokens, table, table, *weights
    )
    assert (logits.shape, logits.dtype) == ((1, 64, spec.config.vocab), np.float32)


@pytest.mark.parametrize(
    ("weights", "cache"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8"), ("int4", "bfloat16")],
)
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_programs_have_shapes(name: str, weights: str, cache: str) -> None:
    """Prefill and decode of the portable target, traced at full size; results have the shapes of the caches."""
    import jax

    from precast.exporter.models.xla_ops import XLA_OPS
    from precast.exporter.programs import Geometry, build_programs, stored_model

    spec = _spec(PUBLISHED[name][0])
    geometry = Geometry(context=256, slots=2, buckets=(32,), kv_cache=cache)
    for program in build_programs(stored_model(spec, weights), geometry, XLA_OPS):
        results = jax.eval_shape(program.function, *program.abstract_arguments())
        found = [SimpleNamespace(shape=r.shape, dtype=str(r.dtype)) for r in results]
        assert found == [SimpleNamespace(shape=v.shape, dtype=v.dtype) for v in program.results]


X64 = """
import json, sys
import jax
from precast.exporter.models.registry import read_model
from precast.exporter.models.cpu_ops import CPU_OPS
from precast.exporter.models.xla_ops import XLA_OPS
from precast.exporter.programs import Geometry, build_programs, stored_model

assert jax.config.jax_enable_x64
spec = read_model(json.loads(sys.argv[1]), "tiny")
for ops in (CPU_OPS, XLA_OPS):
    for program in build_programs(stored_model(spec, "int8"), Geometry(context=32, slots=2, buckets=(8,)), ops):
        lowered = jax.jit(program.function).lower(*program.abstract_arguments())
        calls = [line for line in lowered.as_text().splitlines() if "custom_call @precast" in line]
        found = [str(leaf.dtype) for leaf in jax.tree.leaves(lowered.out_info)]
        print(program.name, len(calls), sum("i64>" in line.rpartition(" : (")[2] for line in calls),
              found == [result.dtype for result in program.results])
"""


def test_programs_do_not_depend_on_jax_enable_x64(python) -> None:
    """The kernels require int32, but with JAX_ENABLE_X64 the counter of a loop is int64."""
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "vocab_size": 40,
        "max_position_embeddings": 64,
    }
    result = python("-c", X64, json.dumps(config), env={"JAX_ENABLE_X64": "1"})
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    kernels, xla = (
        ["cache", "prefill_8", "decode", "score"],
        ["cache", "prefill_8", "decode_1", "decode", "score"],
    )
    assert [line[0] for line in lines] == [*kernels, *xla]
    assert [int(line[1]) > 0 for line in lines] == [True] * len(kernels) + [False] * len(xla)
    assert all(line[2:] == ["0", "True"] for line in lines)
