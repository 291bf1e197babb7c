"""The same tiny model as a Hugging Face checkpoint and as a GGUF file: one config, one set of weights, one answer."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precast.exporter.models.parameters import abstract_model, unknown_sources
from precast.exporter.models.registry import ModelSpec, read_model
from precast.exporter.sources.base import Source
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError


def _load_cases() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent / "reference"))
        return importlib.import_module("gguf_cases")


cases = _load_cases()
CASES, GEMMA3, PHI3 = cases.CASES, cases.GEMMA3, cases.PHI3
Case = Any  # gguf_cases.Case
Writer = Any  # gguf.GGUFWriter


# --- the same model -----------------------------------------------------------------------------------------


def open_both(
    case: Case, folder: Path, arrays: dict[str, np.ndarray] | None = None, kind: str = "F32"
) -> tuple[Source, Source]:
    """Open the case as a Hugging Face checkpoint and as a GGUF file."""
    arrays = case.arrays() if arrays is None else arrays
    path = cases.write_gguf(case, arrays, folder / "tiny.gguf", kind)
    return open_source(str(cases.write_checkpoint(case, arrays, folder / "tiny"))), open_source(str(path))


def bits(array: np.ndarray) -> np.ndarray:
    assert array.dtype == np.float32
    return array.view(np.uint32)


def assert_same_model(one: ModelSpec, other: ModelSpec) -> None:
    windows = {"windows": one.config.layer_windows, "ropes": one.config.layer_ropes}
    others = {"windows": other.config.layer_windows, "ropes": other.config.layer_ropes}
    assert dataclasses.replace(one.config, **windows) == dataclasses.replace(other.config, **others)
    assert one.model_type == other.model_type
    for context in (32, 256):  # the frequencies of longrope differ between these
        for table, same in zip(one.tables(context), other.tables(context), strict=True):
            np.testing.assert_array_equal(bits(table), bits(same))


def reference(spec: ModelSpec) -> Callable[[Source], np.ndarray]:
    """Return a function from a source to its logits ``[T, V]``, for a prompt longer than the windows."""
    import jax
    import jax.numpy as jnp

    model = abstract_model(spec)
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]], jnp.int32)
    cos, sin = spec.tables(64)
    forward = jax.jit(lambda *arrays: model.bind(arrays).forward(tokens, cos, sin))

    def logits(source: Source) -> np.ndarray:
        tensors = spec.adapt(source).tensors
        assert not unknown_sources(model.parameters, tensors)
        arrays = (np.stack([tensors[name].read() for name in p.sources]) for p in model.parameters)
        shaped = [array.reshape(p.shape) for array, p in zip(arrays, model.parameters, strict=True)]
        return np.asarray(forward(*shaped))[0]

    return logits


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_gguf_file_is_the_checkpoint_it_was_made_from(case: Case, tmp_path: Path) -> None:
    checkpoint, file = open_both(case, tmp_path)
    assert file.tensors.keys() == checkpoint.tensors.keys()
    offset = case.architecture.startswith("gemma")
    for name, tensor in checkpoint.tensors.items():
        found, expected = file.tensors[name].read(), tensor.read()
        assert file.tensors[name].shape == found.shape == tensor.shape
        if offset and name.endswith(
            "norm.weight"
        ):  # the converter adds 1 and precast subtracts it: an error of half a float32 step at 1
            np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-24, err_msg=name)
        else:
            np.testing.assert_array_equal(bits(found), bits(expected), err_msg=name)
    specs = [read_model(source.config, source.name) for source in (checkpoint, file)]
    assert_same_model(*specs)
    adapted = [spec.adapt(source).tensors for spec, source in zip(specs, (checkpoint, file), strict=True)]
    assert adapted[0].keys() == adapted[1].keys()
    for name in adapted[0]:
        np.testing.assert_array_equal(
            bits(adapted[0][name].read()), bits(adapted[1][name].read()), err_msg=name
        )
    logits = reference(specs[0])
    expected = logits(checkpoint)
    assert np.isfinite(expected).all()
    assert expected.std() > 0.01
    np.testing.assert_array_equal(expected, logits(file))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "mixtral", "qwen3moe"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_quantised_file_keeps_its_blocks(decode_blocks, name: str, kind: str, tmp_path: Path) -> None:
    """The file equals a checkpoint of its dequantised weights, and its blocks equal the tensors."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    case = CASES[name]
    number = GGMLQuantizationType[kind]
    matrices = {
        tensor: dequantize(quantize(array, number), number) if array.ndim > 1 else array
        for tensor, array in case.arrays().items()
    }
    checkpoint, file = open_both(case, tmp_path, matrices, kind)
    specs = [read_model(source.config, source.name) for source in (checkpoint, file)]
    assert_same_model(*specs)
    adapted = specs[1].adapt(file).tensors
    for tensor, expected in specs[0].adapt(checkpoint).tensors.items():
        np.testing.assert_array_equal(adapted[tensor].read(), expected.read(), err_msg=tensor)
        assert (adapted[tensor].blocks is None) == (len(expected.shape) == 1), tensor
        if adapted[tensor].blocks is not None:
            np.testing.assert_array_equal(decode_blocks(adapted[tensor].blocks()), expected.read())


# --- refusals ------------------ ----------------------------------------------------------------------------


def refusal(case: Case, folder: Path) -> str:
    with pytest.raises(PrecastError) as caught:
        open_source(str(cases.write_gguf(case, case.arrays(), folder / "tiny.gguf")))
    return str(caught.value)


def with_keys(name: str, *more: Callable[[Writer], None]) -> Case:
    """Return a case with additional keys."""
    case = CASES[name]

    def write(writer: Writer) -> None:
        case.metadata(writer)
        for add in more:
            add(writer)

    return dataclasses.replace(case, metadata=write)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (
            with_keys("gemma3", lambda w: w.add_final_logit_softcapping(30.0)),
            "has the metadata key gemma3.final_logit_softcapping = 30.0, which is not understood",
        ),
        (
            with_keys("gemma3", lambda w: w.add_attention_scale(0.5)),
            "has the metadata key gemma3.attention.scale = 0.5",
        ),
        (
            dataclasses.replace(GEMMA3, metadata=cases.key_lengths(24)),
            "lacks the metadata key gemma3.attention.sliding_window",
        ),
        (
            dataclasses.replace(GEMMA3, metadata=cases.newer_gemma3_keys([True])),
            "expected gemma3.attention.sliding_window_pattern to be a list of 7 values (one per layer), found [True]",
        ),
        (
            with_keys("qwen3", lambda w: w.add_sliding_window(8)),
            "has the metadata key qwen3.attention.sliding_window = 8",
        ),
        (
            dataclasses.replace(PHI3, metadata=lambda w: w.add_rope_dimension_count(16)),
            "lacks the metadata key phi3.attention.sliding_window",
        ),
        (
            with_keys("phi3", lambda w: w.add_rope_scaling_attn_factors(1.25)),
            (
                "expected phi3.rope.scaling.attn_factor to be 1 in a file without the tensor rope_factors_long.weight,"
                " found 1.25"
            ),
        ),
        (
            dataclasses.replace(
                CASES["phi3 with longrope"],
                extra={"rope_factors_long.weight": np.array(cases.LONG, np.float32)},
            ),
            "expected 6 RoPE factors in the tensor rope_factors_short.weight, found none",
        ),
        (
            dataclasses.replace(
                CASES["phi3 with longrope"],
                extra={f"rope_factors_{which}.weight": np.ones(8, np.float32) for which in ("long", "short")},
            ),
            "expected 6 RoPE factors in the tensor rope_factors_long.weight, found [8]",
        ),
        (
            dataclasses.replace(CASES["granite"], metadata=cases.llama_keys),
            "lacks the metadata key granite.attention.scale",
        ),
        (
            dataclasses.replace(CASES["llama"], extra={"rope_factors_long.weight": np.ones(8, np.float32)}),
            "contains the unknown tensor rope_factors_long.weight",
        ),
        (
            dataclasses.replace(CASES["qwen2"], extra={"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}),
            "contains the unknown tensor blk.0.attn_q_norm.weight",
        ),
        (
            dataclasses.replace(
                PHI3,
                metadata=cases.phi3_keys(0),
                extra={"blk.0.attn_q.weight": np.ones((64, 64), np.float32)},
            ),
            "contains the unknown tensor blk.0.attn_q.weight",
        ),
        (
            dataclasses.replace(
                CASES["mixtral"], extra={"blk.0.ffn_gate.weight": np.ones((cases.F, cases.D), np.float32)}
            ),
            "contains the unknown tensor blk.0.ffn_gate.weight",
        ),
    ],
)
def test_refusals(case: Case, expected: str, tmp_path: Path) -> None:
    assert expected in refusal(case, tmp_path)


def test_an_attention_factor_that_contradicts_the_context_lengths(tmp_path: Path) -> None:
    def write(writer: Writer) -> None:
        cases.phi3_keys(0, rotated=12)(writer)
        writer.add_rope_scaling_attn_factors(1.19)

    case = dataclasses.replace(CASES["phi3 with longrope"], metadata=write)
    assert (
        "expected phi3.rope.scaling.attn_factor to be 1 (as the context lengths imply), found 1.19"
        in refusal(case, tmp_path)
    )


@pytest.mark.parametrize(("layers", "expected"), [(7, 24), (62, cases.D // cases.N)])
def test_gemma3_of_62_layers_scales_scores_by_its_width(tmp_path: Path, layers: int, expected: int) -> None:
    """The published 27B model does so, although its file has no key for it."""
    case = dataclasses.replace(GEMMA3, layers=layers)
    config = open_source(str(cases.write_gguf(case, case.arrays(), tmp_path / "tiny.gguf"))).config
    assert config["query_pre_attn_scalar"] == expected
