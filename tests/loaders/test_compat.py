"""Matching targets with machines: every mismatch is named, alone and together."""

import dataclasses
from itertools import permutations
from types import SimpleNamespace

import pytest

from precast.loaders.artifact.compat import choose_target, mismatches
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.machine import Machine, cpu_features, processor_family
from precast.loaders.artifact.manifest import Target

MACHINE = Machine(
    machine="x86_64",
    features=("avx", "avx2", "fma"),
    jaxlib="0.10.1",
    kernel_abi=3,
    kernels=("precast.attention.v1", "precast.matmul.v1"),
)
COMPILED = Target(
    name="cpu-x86_64-avx2",
    runtime="pjrt",
    platform="cpu",
    device="any",
    machine="x86_64",
    jaxlib="0.10.1",
    cpu_features=("avx", "avx2"),
    kernel_abi=3,
    kernels=("precast.matmul.v1",),
    xla_flags="",
    stablehlo_expires="2030-01-01",
    programs=(),
)
PORTABLE = dataclasses.replace(
    COMPILED,
    name="portable",
    runtime="stablehlo",
    machine="any",
    jaxlib="any",
    cpu_features=(),
    kernel_abi=0,
    kernels=(),
)


def choose(*targets, machine=MACHINE, name=None, allow_compile=False):
    manifest = SimpleNamespace(targets=targets)
    return choose_target(manifest, machine, "art", name=name, allow_compile=allow_compile)


def refusal(*targets, **options) -> str:
    with pytest.raises(PrecastError) as raised:
        choose(*targets, **options)
    return str(raised.value)


WRONG = {
    "platform": ({"platform": "tpu"}, "it needs platform tpu, but this loader supports only cpu and cuda"),
    "machine": ({"machine": "aarch64"}, "it was compiled for aarch64, but this machine is x86_64"),
    "jaxlib": ({"jaxlib": "0.12.0"}, "it was compiled by jaxlib 0.12.0, but 0.10.1 is installed"),
    "cpu": (
        {"cpu_features": ("avx", "avx512f", "amx-int8")},
        "it uses CPU features that this machine lacks (amx-int8, avx512f)",
    ),
    "abi": ({"kernel_abi": 4}, "it calls kernels of ABI 4, but ABI 3 is installed"),
    "kernels": (
        {"kernels": ("precast.matmul.v1", "precast.z.v9", "precast.new.v2")},
        "it calls kernels that are not installed (precast.new.v2, precast.z.v9)",
    ),
}


def test_a_target_that_fits_has_no_mismatch():
    assert mismatches(COMPILED, MACHINE) == []
    assert mismatches(PORTABLE, MACHINE) == []


@pytest.mark.parametrize(("change", "text"), WRONG.values(), ids=WRONG)
def test_each_mismatch_alone(change, text):
    assert mismatches(dataclasses.replace(COMPILED, **change), MACHINE) == [text]
    message = refusal(dataclasses.replace(COMPILED, **change))
    assert message.startswith(f"art: no target runs here: target 'cpu-x86_64-avx2': {text}. Export")
    assert message.endswith("or compile from StableHLO with --compile.")


def test_kernels_require_their_abi():
    text = "it calls kernels of ABI 0, but ABI 3 is installed"
    assert mismatches(dataclasses.replace(COMPILED, kernel_abi=0), MACHINE) == [text]
    assert mismatches(dataclasses.replace(COMPILED, kernel_abi=0, kernels=()), MACHINE) == []


def test_all_mismatches_together():
    wrong = dataclasses.replace(COMPILED, **{k: v for change, _ in WRONG.values() for k, v in change.items()})
    assert mismatches(wrong, MACHINE) == [text for _, text in WRONG.values()]
    message = refusal(wrong)
    assert all(text in message for _, text in WRONG.values())


WIDER = dataclasses.replace(COMPILED, name="cpu-x86_64-avx512f", cpu_features=("avx", "avx2", "avx512f"))
NARROWER = dataclasses.replace(COMPILED, name="cpu-x86_64-sse4.2", cpu_features=("sse4.2",))
SAVED = dataclasses.replace(PORTABLE, name="savedmodel", runtime="savedmodel")


def test_the_widest_target_that_fits_is_taken():
    for targets in permutations((WIDER, COMPILED, NARROWER, PORTABLE)):
        assert choose(*targets) is COMPILED
    with_avx512 = dataclasses.replace(MACHINE, features=("avx", "avx2", "avx512f", "fma", "sse4.2"))
    for targets in permutations((WIDER, COMPILED, NARROWER, PORTABLE)):
        assert choose(*targets, machine=with_avx512) is WIDER
    old = dataclasses.replace(MACHINE, features=("sse4.2",))
    assert choose(WIDER, COMPILED, NARROWER, machine=old) is NARROWER
    text = refusal(WIDER, COMPILED, machine=old)
    assert "lacks (avx, avx2, avx512f); target 'cpu-x86_64-avx2': it uses" in text


def test_the_first_of_equal_targets_is_taken():
    twin = dataclasses.replace(COMPILED, name="twin")
    assert choose(twin, COMPILED) is twin
    assert choose(COMPILED, twin) is COMPILED


def test_executables_rank_above_a_savedmodel_and_that_above_compiling():
    able = dataclasses.replace(MACHINE, tensorflow=True)
    for targets in permutations((PORTABLE, SAVED, NARROWER)):
        assert choose(*targets, machine=dataclasses.replace(able, features=("sse4.2",))) is NARROWER
        assert choose(*targets, machine=able, allow_compile=True) is SAVED
        assert choose(*targets, allow_compile=True).runtime == "stablehlo"


def test_a_target_without_stablehlo_is_not_compiled():
    program = SimpleNamespace(stablehlo=None)
    bare = dataclasses.replace(COMPILED, jaxlib="9.9", programs=(program,))
    assert "it was compiled by jaxlib 9.9" in refusal(bare, allow_compile=True)
    assert choose(bare, PORTABLE, allow_compile=True) is PORTABLE


def test_stablehlo_is_compiled_only_on_request():
    wrong = dataclasses.replace(COMPILED, jaxlib="9.9")
    message = refusal(wrong, PORTABLE)
    assert "target 'cpu-x86_64-avx2': it was compiled by jaxlib 9.9, but 0.10.1 is installed" in message
    assert "target 'portable': it must be compiled first (--compile does so)" in message
    assert choose(wrong, PORTABLE, allow_compile=True).name == COMPILED.name


def test_the_stablehlo_of_a_cpu_target_ranks_above_the_portable_target():
    wrong = dataclasses.replace(COMPILED, jaxlib="9.9", machine="riscv64", cpu_features=("warp",))
    chosen = choose(wrong, PORTABLE, allow_compile=True)
    assert (chosen.name, chosen.runtime) == (COMPILED.name, "stablehlo")
    assert mismatches(chosen, MACHINE) == []
    # If a target needs kernels that are not installed, it cannot be compiled here either.
    other_abi = dataclasses.replace(wrong, kernel_abi=COMPILED.kernel_abi + 1)
    assert choose(other_abi, PORTABLE, allow_compile=True).name == PORTABLE.name
    # A matching executable ranks above compiling, even with permission to compile.
    assert choose(PORTABLE, allow_compile=True) == PORTABLE
    assert choose(COMPILED, PORTABLE, allow_compile=True) is COMPILED


def test_a_named_target_is_taken_or_refused_but_never_replaced():
    wrong = dataclasses.replace(COMPILED, name="other", machine="aarch64")
    assert choose(wrong, COMPILED, name="cpu-x86_64-avx2") is COMPILED
    message = refusal(wrong, COMPILED, name="other")
    assert "target 'other': it was compiled for aarch64" in message
    assert "cpu-x86_64-avx2" not in message
    assert refusal(COMPILED, PORTABLE, name="gpu") == (
        "art: target 'gpu' is not in the artifact; name one of its targets: 'cpu-x86_64-avx2', 'portable'."
    )


def test_an_artifact_without_targets_is_refused():
    assert refusal() == "art: expected at least one target, found none; export the model again."
    assert refusal(name="cpu") == refusal()


def test_this_machine_is_described():
    assert processor_family() in ("x86_64", "aarch64")
    features = cpu_features()
    assert list(features) == sorted(set(features))
    assert {"x86_64": "sse2", "aarch64": "neon"}[processor_family()] in features
