"""The CUDA target without a GPU: fixed layouts from export to loader, bfloat16 products, refusals."""

import dataclasses
import json
import re
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.exporter.export import export
from precast.exporter.models.registry import read_model
from precast.exporter.models.xla_ops import XLA_OPS, xla_ops
from precast.exporter.options import ExportOptions
from precast.exporter.programs import Geometry, ProgramSpec, build_programs, stored_model, with_layouts
from precast.exporter.reference import fidelity, golden
from precast.exporter.targets.cuda import CUDA_OPS, cuda_device, decode_layouts
from precast.exporter.targets.kinds import TARGET_KINDS
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest import Value
from precast.loaders.artifact.manifest_parser import parse_manifest
from precast.loaders.generation.engine import DecodeRow
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load

PROMPTS = ([5], list(range(1, 8)), [7 * i % 320 for i in range(30)])


def value(name, role, shape, layout=None, alias=None):
    layout = tuple(range(len(shape))) if layout is None else layout
    return Value(name=name, role=role, shape=shape, dtype="float32", layout=layout, alias=alias)


def turned_layouts(decode, _device=None):
    """Permute the axes of each array, differently for different arrays."""
    free = [v for v in decode.arguments if v.role in ("cache", "weight")]
    orders = {}
    for i, v in enumerate(free):
        others = list(permutations(range(len(v.shape))))[1:]
        orders[v.name] = others[i * 7 % len(others)]
    return orders


def on_the_cpu(name, ops, layouts):
    """Return the CUDA kind of target, compiled for the CPU."""
    return dataclasses.replace(
        TARGET_KINDS["cuda"],
        name=name,
        ops=ops,
        platform="cpu",
        lowered_for=("cpu",),
        device=lambda: jax.devices("cpu")[0],
        layouts=layouts,
    )


def answers(model):
    """Return greedy tokens and logits of chunked prompts and single steps."""
    found = []
    for prompt in PROMPTS:
        engine = model.engine
        cache = engine.new_cache()
        step = engine.prefill(prompt, cache)
        for position in range(len(prompt), len(prompt) + 6):
            found.append((int(step.token[0]), engine.logits(step)[0].copy()))
            step = engine.decode([DecodeRow(0, int(step.token[0]), position)], cache)
    return [token for token, _ in found], np.array([logits for _, logits in found])


# --- with_layouts -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.permutations(range(3)), st.permutations(range(2)))
def test_a_program_with_other_layouts_computes_the_same(cache_order, weight_order):
    cache, weight = value("cache", "cache", (2, 3, 4)), value("w", "weight", (4, 5))
    spec = ProgramSpec(
        name="p",
        kind="decode",
        tokens=1,
        arguments=(cache, weight),
        results=(value("y", "logits", (2, 3, 5)), value("cache", "cache", (2, 3, 4), alias="cache")),
        function=lambda c, w: (c @ w, c + 1),
        flops=0,
    )
    layouts = {"cache": tuple(cache_order), "w": tuple(weight_order)}
    turned = with_layouts(spec, layouts)
    c, w = np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.arange(20, dtype=np.float32).reshape(4, 5)
    given_arrays = [c.transpose(cache_order), w.transpose(weight_order)]
    assert [a.shape for a in turned.abstract_arguments()] == [a.shape for a in given_arrays]
    y, after = turned.function(*map(jnp.asarray, given_arrays))
    np.testing.assert_array_equal(y, c @ w)
    np.testing.assert_array_equal(after, (c + 1).transpose(cache_order))
    assert [v.layout for v in turned.arguments] == [layouts["cache"], layouts["w"]]
    assert turned.results[1].layout == layouts["cache"]
    assert turned.results[1].physical == after.shape
    assert turned.donated == spec.donated == (0,)


def test_the_same_layouts_change_nothing():
    spec = build_programs(*tiny_programs("float32"))[-1]
    same = with_layouts(spec, {v.name: v.layout for v in spec.arguments})
    texts = [jax.jit(s.function).lower(*s.abstract_arguments()).as_text() for s in (spec, same)]
    # Only the names of the functions differ.
    assert len(set(re.sub(r"@jit_\w+|jit\(\w+\)", "", text) for text in texts)) == 1


def tiny_programs(weights, ops=XLA_OPS, **config):
    tiny = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    model = stored_model(read_model({**tiny, **config}, "tiny").with_context(32), weights)
    return model, Geometry(context=32, slots=1, buckets=(8,), kv_cache="bfloat16"), ops


# --- from export to loader ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(export_tiny):
    """Export a model with row-major layouts and with permuted layouts, and in bfloat16 with permuted layouts."""
    kinds = [on_the_cpu("plain", XLA_OPS, None), on_the_cpu("turned", XLA_OPS, turned_layouts)]
    kinds.append(on_the_cpu("bf16", CUDA_OPS, turned_layouts))
    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds:
            patch.setitem(TARGET_KINDS, kind.name, kind)
        patch.setattr(fidelity, "measure", lambda *_, **__: None)
        patch.setattr(golden, "REDUCED_TIE", golden.BFLOAT16_TIE)
        both = export_tiny(targets=("plain", "turned"), buckets=(8,))
        alone = export_tiny(targets=("bf16",), buckets=(8,), weights="bfloat16")
    return both, alone


def targets_by_kind(artifact):
    """Return the targets by kind: the part of the name before the CPU's level."""
    manifest = parse_manifest((artifact / "manifest.json").read_bytes(), "m")
    return {target.name.partition("-")[0]: target for target in manifest.targets}


def test_pinned_layouts_give_the_same_tokens_through_the_loader(exported):
    named = targets_by_kind(exported[0])
    tokens, logits = answers(load(exported[0], target=named["plain"].name))
    other, others = answers(load(exported[0], target=named["turned"].name))
    assert other == tokens
    # The order of summation differs, so the sums differ slightly.
    np.testing.assert_allclose(others, logits, rtol=1e-4, atol=1e-4)


def test_bfloat16_with_pinned_layouts_answers_as_recorded(exported):
    """The export compared the answers with the reference; this test generates them again."""
    model = load(exported[1])
    golden = json.loads((exported[1] / "golden.json").read_text())["greedy"]
    assert sum(len(case["token_ids"]) for case in golden) > 5
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    for case in golden:
        found = model.generate(tuple(case["prompt_token_ids"]), params).token_ids
        assert list(found[: len(case["token_ids"])]) == case["token_ids"]


def test_layouts_are_recorded(exported):
    both, alone = exported
    for artifact, first in ((both, "plain"), (alone, "bf16")):
        manifest = parse_manifest((artifact / "manifest.json").read_bytes(), "m")
        targets = targets_by_kind(artifact)
        assert next(iter(targets)) == first
        turned = targets.get("turned") or targets["bf16"]
        decode = turned.of_kind("decode")[0]
        expected = turned_layouts(decode)
        for program in turned.programs:
            for v in (*program.arguments, *program.results):
                rows = tuple(range(len(v.shape)))
                assert v.layout == expected.get(v.name, rows), (program.name, v.name)
        # The manifest describes the KV cache as the first target stores it.
        caches = {c.name: c.layout for c in manifest.cache}
        plain = all(layout == tuple(range(len(layout))) for layout in caches.values())
        assert plain == (first == "plain")
        if not plain:
            assert caches == {name: expected[name] for name in caches}


@pytest.mark.parametrize(
    ("program", "place", "text"),
    [
        (0, ("results", 0), "layout of 'cache.keys': expected"),
        (1, ("arguments", 4), "layout of 'cache.keys': expected"),
        (-1, ("arguments", -1), "layout of 'model.norm.weight': expected"),
    ],
)
def test_a_target_whose_programs_disagree_is_refused(exported, program, place, text):
    record = json.loads((exported[0] / "manifest.json").read_text())
    list_, index = place
    layout = record["targets"][1]["programs"][program][list_][index]["layout"]
    layout[:] = layout[::-1]
    with pytest.raises(PrecastError, match=re.escape(text)):
        parse_manifest(json.dumps(record).encode(), "m")


@pytest.mark.parametrize("layout", [[0, 0, 1, 2, 3], [0, 1], [0, 1, 2, 3, 5], []])
def test_an_invalid_layout_is_refused(exported, layout):
    record = json.loads((exported[0] / "manifest.json").read_text())
    record["targets"][1]["programs"][1]["arguments"][4]["layout"] = layout
    with pytest.raises(PrecastError, match=r"axes in the layout of 'cache\.keys'"):
        parse_manifest(json.dumps(record).encode(), "m")


def test_arguments_and_results_are_row_major(exported):
    record = json.loads((exported[0] / "manifest.json").read_text())
    record["targets"][1]["programs"][-1]["results"][1]["layout"] = [1, 0]
    with pytest.raises(PrecastError, match="layout of 'logits': expected"):
        parse_manifest(json.dumps(record).encode(), "m")


# --- choosing layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_the_compiler_chooses_layouts_of_caches_and_weights(weights):
    """The CPU's compiler keeps the axes in order."""
    decode = build_programs(*tiny_programs(weights, CUDA_OPS))[-1]
    layouts = decode_layouts(decode, jax.devices("cpu")[0])
    free = [v for v in decode.arguments if v.role in ("cache", "weight")]
    assert set(layouts) == {v.name for v in free}
    assert all(layouts[v.name] == v.layout for v in free)


def test_without_a_gpu_the_refusal_is_one_sentence(tiny_source, tmp_path):
    message = (
        "--target cuda needs a GPU that jax sees; jax sees cpu. Export on a machine with an NVIDIA GPU and jax's CUDA"
        f" plugin: pip install 'jax[cuda12]=={jax.__version__}'"
    )
    with pytest.raises(PrecastError) as raised:
        cuda_device()
    assert str(raised.value) == message
    options = ExportOptions(targets=("cpu", "cuda"), buckets=(8,))
    with pytest.raises(PrecastError, match="jax sees cpu"):
        export(tiny_source(), tmp_path / "none", options)
    assert not any(tmp_path.iterdir())


# --- bfloat16 -----------------------------------------------------------------------------------------------

_DOT = re.compile(r"stablehlo\.dot_general.*: \((\S+), (\S+)\) -> (\S+)")


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_products_take_bfloat16_and_sum_in_float32(model_type):
    config = {"num_local_experts": 4, "num_experts_per_tok": 2} if model_type == "mixtral" else {}
    programs = build_programs(*tiny_programs("bfloat16", CUDA_OPS, model_type=model_type, **config))
    text = jax.jit(programs[1].function).lower(*programs[1].abstract_arguments()).as_text()
    dots = _DOT.findall(text)
    assert len(dots) >= 9  # q, k, v, o, two of attention, three of the MLP
    for left, right, result in dots:
        assert (left[-6:], right[-6:], result[-5:]) == ("xbf16>", "xbf16>", "xf32>"), (left, right, result)


def test_products_of_a_single_row_with_weights_are_not_dots():
    """For a dot, XLA would copy a layer's matrix out of the stack, so only attention's two products are dots."""
    decode = _decode_of_one(CUDA_OPS)
    text = jax.jit(decode.function).lower(*decode.abstract_arguments()).as_text()
    assert len(_DOT.findall(text)) == 2
    assert len(_DOT.findall(_text_of_decode("float32"))) == 10


def _decode_of_one(ops):
    """Return the program that decodes a single sequence."""
    return next(p for p in build_programs(*tiny_programs("bfloat16", ops)) if p.kind == "decode")


def _text_of_decode(compute):
    decode = _decode_of_one(xla_ops(compute))
    return jax.jit(decode.function).lower(*decode.abstract_arguments()).as_text()


def test_cuda_lowers_without_a_gpu_and_without_calls():
    """A GPU is needed for compiling only, not for lowering."""
    from precast.exporter.targets.build import _stablehlo

    for spec in build_programs(*tiny_programs("bfloat16", CUDA_OPS)):
        function = jax.jit(spec.function, donate_argnums=spec.donated, keep_unused=True)
        module = _stablehlo(TARGET_KINDS["cuda"], spec, function)
        assert b"custom_call" not in module
