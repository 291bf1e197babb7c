"""The options of an export: defaults, and refusals before a model is read or a file is written."""

from dataclasses import replace
from pathlib import Path

import pytest

from precast.exporter import console
from precast.exporter.export import export
from precast.exporter.models.registry import read_model
from precast.exporter.options import ExportOptions, check_options, choose_geometry
from precast.exporter.plan import _rope_remark
from precast.exporter.programs import CACHE_TYPES
from precast.exporter.quantize import WEIGHTS
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.compiling import isa
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load


def test_default_buckets_are_those_within_the_context(tmp_path, tiny_source):
    options = ExportOptions(weights="float32", targets=("cpu",))
    short = replace(options, context=40)
    assert export(tiny_source(), tmp_path / "short", short).buckets == (40,)
    assert choose_geometry(options, longrope(limit=600)).buckets == (64, 128, 512)
    assert choose_geometry(options, longrope(limit=200)).buckets == (64, 128)


def longrope(limit):
    """Return a model whose RoPE frequencies differ for contexts above 96 positions."""
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"vocab_size": 9, "max_position_embeddings": limit, "original_max_position_embeddings": 96}
    return read_model({"model_type": "phi3", **config, "rope_scaling": scaling}, "config.json")


def test_a_rope_that_depends_on_the_context_gets_a_remark():
    assert _rope_remark(longrope(limit=600), 96) is None
    assert "other frequencies for contexts above 96 positions" in _rope_remark(longrope(limit=600), 97)


def llama(layers, kv_heads, context):
    """Return a model with heads of 128 dimensions."""
    config = {"hidden_size": 4096, "intermediate_size": 64, "num_attention_heads": 32, "vocab_size": 9}
    config |= {
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
    }
    return read_model({"model_type": "llama", **config}, "config.json")


@pytest.mark.parametrize(
    ("layers", "kv_heads", "context", "slots"),
    [
        (32, 32, 2048, 8),  # 8 GiB in bfloat16
        (32, 32, 4096, 8),
        (32, 32, 4097, 4),
        (32, 32, 32768, 1),
        (32, 32, 131072, 1),  # one slot takes 64 GiB
        (32, 4, 32768, 8),
    ],
)
def test_the_default_slots_keep_the_kv_cache_within_16_gib(layers, kv_heads, context, slots):
    geometry = choose_geometry(ExportOptions(context=context), llama(layers, kv_heads, context))
    assert geometry.slots == slots
    asked = choose_geometry(ExportOptions(context=context, slots=5), llama(layers, kv_heads, context))
    assert asked.slots == 5


def test_targets_on_which_idle_slots_cost_something_get_one(monkeypatch):
    monkeypatch.setattr("precast.exporter.targets.savedmodel.check_packages", lambda: None)
    for targets, slots in ((("cpu",), 8), (("portable",), 8), (("cpu", "savedmodel"), 1)):
        assert choose_geometry(ExportOptions(targets=targets), longrope(limit=600)).slots == slots


def test_buckets_are_sorted_and_the_context_defaults_to_the_model_s_limit(tmp_path, tiny_source):
    options = ExportOptions(buckets=(32, 1), weights="float32", targets=("cpu",))
    manifest = export(tiny_source(config={"max_position_embeddings": 40}), tmp_path / "a", options)
    assert (manifest.buckets, manifest.context) == ((1, 32), 40)


def test_a_bucket_may_fill_the_context(tmp_path, tiny_source):
    export(
        tiny_source(),
        tmp_path / "a",
        ExportOptions(buckets=(32,), context=32, weights="float32", targets=("cpu",)),
    )
    found = load(tmp_path / "a").generate([5] * 31, SamplingParams(ignore_eos=True))
    assert len(found.token_ids) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"buckets": ()}, "--buckets: expected at least one prompt length, found none."),
        ({"buckets": (0,)}, "--buckets: expected prompt lengths of 1 or more, found 0."),
        ({"buckets": (8, 8)}, "--buckets: 8 is given twice"),
        ({"buckets": (33,), "context": 32}, "--buckets: 33 is larger than the context of 32"),
        (
            {"targets": ()},
            "--target: expected one or more of cpu, portable, cuda, savedmodel without repeats, found none.",
        ),
        (
            {"targets": ("gpu",)},
            "--target: expected one or more of cpu, portable, cuda, savedmodel without repeats, found 'gpu'.",
        ),
        ({"targets": ("cpu", "cpu")}, "without repeats, found one of them twice."),
        ({"context": 129}, "--context: expected 2 to 128 (the model's own limit), found 129."),
        ({"slots": 0}, "--slots: expected 1 to 256, found 0."),
        (
            {"weights": "int2"},
            "--weights: expected one of float32, bfloat16, int8, int4, source, found 'int2'.",
        ),
        (
            {"kv_cache": "int4"},
            "--kv-cache: expected one of float32, bfloat16, int8, found 'int4'.",
        ),
    ],
)
def test_impossible_options_are_refused(export_refusal, tiny_source, options, text):
    assert text in export_refusal(
        tiny_source(), ExportOptions(**{"buckets": (8,), "weights": "float32", **options})
    )


# --- pairs of options ---------------------------------------------------------------------------------------

# Option pairs on the command line, and the error about each pair; None for a pair that is allowed.
BITS_AND = "--bits: chooses the formats of all weights, but --weights is {}; leave out one of them."
NOT_CALIBRATED = (
    "--calibrate: expected --weights int4 or --bits, found {}; use one of them, or leave out --calibrate."
)
NO_CPU = "--cpu-isa: applies only to the target cpu; add --target cpu."
PAIRS: tuple[tuple[str, str | None], ...] = (
    *((f"--bits 5 --weights {name}", BITS_AND.format(name)) for name in WEIGHTS),
    *((f"--calibrate a.txt --weights {name}", NOT_CALIBRATED.format(f"--weights {name}"))
      for name in WEIGHTS if name != "int4"),
    ("--calibrate a.txt", NOT_CALIBRATED.format("neither")),
    ("--calibrate a.txt --weights int4", None),
    ("--calibrate a.txt --bits 5", None),
    ("--cpu-isa native --target portable", NO_CPU),
    ("--cpu-isa native --target portable --target cpu", None),
    ("--cpu-isa native", None),
    ("--buckets 8,33 --context 32", "--buckets: 33 is larger than the context of 32; leave it out or raise --context."),
    ("--buckets 8,32 --context 32", None),
    *((f"--bits 5 {other}", None) for other in (
        "--kv-cache int8", "--kv-cache float32", "--target portable", "--slots 256", "--context 2", "--overwrite")),
    *((f"--kv-cache {cache} --weights {name}", None) for cache in CACHE_TYPES for name in WEIGHTS),
)  # fmt: skip


@pytest.mark.parametrize(("arguments", "error"), PAIRS, ids=[pair for pair, _ in PAIRS])
def test_contradictory_options_are_refused_before_a_model_is_read(arguments, error, cli, monkeypatch):
    opened = []
    monkeypatch.setattr(console, "open_source", lambda spec: opened.append(spec) or stop())
    result = cli("export", "model", *arguments.split())
    assert result.exit_code == 2
    assert opened == ([] if error else ["model"])
    assert (error or "no model") in " ".join(result.output.split())


def stop():
    raise PrecastError("no model")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [("", "tiny-int8"), ("--weights int4", "tiny-int4"), ("--bits 5", "tiny-mixed")],
)
def test_the_default_folder_is_named_after_the_model_and_its_weights(
    arguments, name, cli, monkeypatch, tiny_source
):
    outputs = []
    monkeypatch.setattr(console, "open_source", lambda spec: tiny_source())
    monkeypatch.setattr(console, "export", lambda source, path, *_, **__: outputs.append(path) or stop())
    assert cli("export", *arguments.split()).exit_code == 2
    assert outputs == [Path("artifacts") / name]


# --- instruction sets ---------------------------------------------------------------------------------------


def refusal(**options) -> str:
    """Return the error of `check_options`."""
    with pytest.raises(PrecastError) as raised:
        check_options(ExportOptions(**options))
    return str(raised.value)


@pytest.fixture
def machine(monkeypatch):
    """Replace the machine's processor."""

    def be(family, *features) -> None:
        monkeypatch.setattr(isa, "processor_family", lambda: family)
        monkeypatch.setattr(isa, "cpu_features", lambda: features)

    return be


def test_impossible_instruction_sets_are_refused(machine):
    machine("x86_64", *isa.LEVELS["x86-64-v3"].features)
    assert refusal(cpu_isas=("mmx",)) == (
        "--cpu-isa: expected one of x86-64-v2, x86-64-v3, x86-64-v4, native, found 'mmx'."
    )
    for former, level in (("sse4.2", "v2"), ("avx", "v2"), ("avx2", "v3"), ("avx512", "v4")):
        assert refusal(cpu_isas=(former,)).endswith(
            f"the name used before version 0.3; write x86-64-{level}."
        )
    text = refusal(cpu_isas=("x86-64-v2", "x86-64-v4"))
    assert text.startswith(
        "--cpu-isa: x86-64-v4 needs CPU features that this machine lacks (avx512bw, avx512cd"
    )
    assert text.endswith("copy the artifact to that machine and run precast add-target --cpu-isa x86-64-v4.")
    assert "without repeats, found one of them twice" in refusal(cpu_isas=("native", "native"))
    assert "without repeats, found none" in refusal(cpu_isas=())
    assert refusal(cpu_isas=("native",), targets=("portable",)) == (
        "--cpu-isa: applies only to the target cpu; add --target cpu."
    )
    check_options(ExportOptions(cpu_isas=("native", "x86-64-v2", "x86-64-v3")))
    check_options(ExportOptions(targets=("portable",)))
    machine("aarch64", "neon")
    assert refusal(cpu_isas=("x86-64-v2",)).startswith(
        "--cpu-isa: x86-64-v2 is a level of x86-64, but this machine is aarch64; omit --cpu-isa, or"
    )
    check_options(ExportOptions(cpu_isas=("native",)))


def test_the_default_instruction_set_suits_most_machines(machine):
    for level in isa.LEVELS.values():
        machine("x86_64", *level.features)
        assert isa.default_isa() == "x86-64-v2"
    machine("x86_64", *isa.LEVELS["x86-64-v2"].features[1:])
    assert isa.default_isa() == "native"
    machine("aarch64", "neon")
    assert isa.default_isa() == "native"
