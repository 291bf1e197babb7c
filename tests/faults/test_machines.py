"""FAULTS 8 to 11: programs for another machine, another jaxlib, or other kernels than those installed."""

import json
import platform
import re
import shlex
import struct

import pytest

PROGRAMS = ("cache", "prefill_8", "prefill_16", "decode", "score")
# Undefined instructions: ud2 of x86, udf of aarch64.
NO_INSTRUCTION = {"x86_64": b"\x0f\x0b", "aarch64": b"\0\0\0\0"}


def change_target(**changes):
    return lambda manifest: manifest["targets"][0].update(changes)


@pytest.fixture
def without_programs(artifact_copy):
    """Remove all programs, so that reading one raises an error."""
    for path in artifact_copy.rglob("*.xla"):
        path.unlink()
    return artifact_copy


# --- 8: the wrong CPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature", ["avx10.3-512", "amx-fp64"])
def test_fault_08_a_wider_cpu_is_refused_before_a_program_is_read(
    without_programs, edit_manifest, run_refused, cli, feature
):
    edit_manifest(without_programs, lambda m: m["targets"][0]["cpu_features"].append(feature))
    assert f"it uses CPU features that this machine lacks ({feature})" in run_refused(without_programs)
    result = cli("check", without_programs)
    assert result.exit_code == 1
    assert f"! it uses CPU features that this machine lacks ({feature})\n" in result.stdout
    assert "→ export with --cpu-isa" in result.stdout


def test_fault_08_the_same_host_is_not_refused(tiny_artifact, cli, python):
    """A new process, which detects the CPU's features again, does not refuse the artifact either."""
    assert json.loads(cli("check", tiny_artifact, "--json").stdout)["targets"][0]["mismatches"] == []
    result = python("cli.py", "run", str(tiny_artifact), "--ids", "7,200,31", "-n", "2", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["compiles"] == 0


def test_fault_08_the_manifest_lists_the_features_of_the_executables(tiny_artifact):
    """XLA's loader compares these features with the machine's, so the manifest must list the same ones."""
    from precast.loaders.artifact.machine import CODEGEN_FEATURES, cpu_features
    from precast.loaders.locate import read_manifest

    target = read_manifest(tiny_artifact).targets[0]
    assert set(target.cpu_features) <= set(cpu_features())
    found = set()
    for program in target.programs:
        data = (tiny_artifact / program.executable).read_bytes()
        for features in re.findall(rb"(?:[+-][a-z0-9._-]+,){4,}[+-][a-z0-9._-]+", data):
            found |= {f[1:].decode() for f in features.split(b",") if f.startswith(b"+")}
    assert found
    assert found & CODEGEN_FEATURES == set(target.cpu_features)


def spoil(data: bytes) -> bytes:
    """Replace every instruction in an executable's machine code with an undefined one."""
    spoiled, start, nothing = bytearray(data), -1, NO_INSTRUCTION[platform.machine()]
    while (start := data.find(b"\x7fELF", start + 1)) >= 0:
        (sections,) = struct.unpack_from("<Q", data, start + 0x28)
        size, count = struct.unpack_from("<HH", data, start + 0x3A)
        for i in range(count):
            _, kind, flags, _, offset, length = struct.unpack_from(
                "<IIQQQQ", data, start + sections + i * size
            )
            if kind == 1 and flags & 4:  # PROGBITS, executable
                length -= length % len(nothing)
                place = start + offset
                spoiled[place : place + length] = nothing * (length // len(nothing))
    return bytes(spoiled)


@pytest.mark.skipif(
    platform.machine() not in NO_INSTRUCTION, reason="no undefined instruction is known for this CPU"
)
@pytest.mark.parametrize("program", ["prefill_8", "decode"])
def test_fault_08_an_undefined_instruction_has_an_error_text(
    artifact_copy, put, run_refused, own_cache, program
):
    """According to the manifest, the target fits this machine, and every hash is correct."""
    name = f"programs/cpu/{program}.xla"
    data = (artifact_copy / name).read_bytes()
    assert spoil(data) != data
    put(artifact_copy, name, spoil(data))
    expected = (
        f"{artifact_copy}: target 'cpu-[^']+' was tried in a child process, which crashed while running"
        rf" {program} \(SIGILL\); its programs do not suit this machine: compile them here with --compile, or export"
        " again."
    )
    for _ in range(2):  # a failed trial is not recorded
        assert re.fullmatch(expected, run_refused(artifact_copy))


# --- 9: another jaxlib --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.10.0", "0.99.0", "", "0.10.1 "])
def test_fault_09_another_jaxlib_is_refused_from_the_manifest_alone(
    without_programs, edit_manifest, run_refused, cli, version
):
    from jaxlib.version import __version__ as installed

    edit_manifest(without_programs, change_target(jaxlib=version))
    expected = f"it was compiled by jaxlib {version}, but {installed} is installed"
    assert expected in run_refused(without_programs)
    result = cli("check", without_programs)
    assert result.exit_code == 1
    assert f"! {expected}" in result.stdout
    assert f"→ pip install {shlex.quote(f'jaxlib=={version}')}" in result.stdout


def test_fault_09_another_jaxlib_s_executable_has_an_error_text_even_if_the_manifest_is_wrong(
    artifact_copy, put, run_refused, own_cache
):
    """Move or remove parts of the serialised executable, as a change of jaxlib's format might."""
    name = "programs/cpu/decode.xla"
    data = (artifact_copy / name).read_bytes()
    for changed in (data[1:], data[: len(data) // 2], data[:100] + data[140:], data + data, data[::-1]):
        put(artifact_copy, name, changed)
        text = run_refused(artifact_copy)
        assert f"{artifact_copy}" in text
        assert "XLA does not load this executable" in text or "was tried in a child process" in text


# --- 10: custom calls ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lapack_sgetrf_ffi", "precast.layers.v99", "blas_strsm"])
def test_fault_10_custom_calls_that_are_not_ours_are_refused(
    without_programs, edit_manifest, run_refused, cli, name
):
    edit_manifest(without_programs, lambda m: m["targets"][0]["kernels"].append(name))
    expected = f"it calls kernels that are not installed ({name})"
    assert expected in run_refused(without_programs)
    result = cli("check", without_programs)
    assert (result.exit_code, f"! {expected}" in result.stdout) == (1, True)


def test_fault_10_an_executable_that_calls_what_its_manifest_does_not_list(
    artifact_copy, put, run_refused, own_cache, monkeypatch
):
    """A call of any kind of kernel, in the thunks or the HLO, is refused before XLA reads a byte."""
    from precast.loaders.runtime import pjrt

    monkeypatch.setattr(pjrt.Client, "load", None)
    name = "programs/cpu/decode.xla"
    data = (artifact_copy / name).read_bytes()
    places = [m.start() for m in re.finditer(rb"precast\.layers\.v2", data)]
    assert len(places) == 2
    for call in (b"lapack_sgetrf_ffi", b"xla_python_gpu_cb", b"precast.norms.v22"):
        for at in places:
            put(artifact_copy, name, data[:at] + call + data[at + len(call) :])
            assert run_refused(artifact_copy) == (
                f"{artifact_copy}: target 'cpu-x86-64-v2': program 'decode' calls {call.decode()}, which the manifest"
                " does not list among the target's kernels; export the model again."
            )


@pytest.mark.parametrize("left_out", ["precast.layers.v2", "precast.embed.v1"])
def test_fault_10_a_manifest_that_lists_too_few_kernels(
    artifact_copy, edit_manifest, refusal, own_cache, left_out
):
    edit_manifest(artifact_copy, lambda m: m["targets"][0]["kernels"].remove(left_out))
    expected = f"program 'prefill_8' calls {left_out}, which the manifest does not list"
    assert expected in refusal("run", artifact_copy, "--ids", "7")
    # The StableHLO of the program is not compiled either.
    edit_manifest(artifact_copy, change_target(runtime="stablehlo", jaxlib="any", cpu_features=[]))
    assert expected in refusal("run", artifact_copy, "--target", "cpu-x86-64-v2", "--compile", "--ids", "7")


def test_fault_10_abi_0_does_not_evade_the_check_of_the_abi(without_programs, edit_manifest, run_refused):
    edit_manifest(without_programs, change_target(kernel_abi=0))
    assert re.search(r"it calls kernels of ABI 0, but ABI \d+ is installed", run_refused(without_programs))


def test_fault_10_stablehlo_that_calls_what_its_manifest_does_not_list(
    artifact_copy, put, refusal, own_cache
):
    name = "programs/portable/decode.stablehlo"
    data = (artifact_copy / "programs/cpu/decode.stablehlo").read_bytes()
    assert b"precast.layers.v2" in data
    put(artifact_copy, name, data)
    text = refusal("run", artifact_copy, "--target", "portable", "--compile", "--ids", "7")
    assert "target 'portable': program 'decode' calls precast.argmax.v2, precast.embed.v1, precast.la" in text
    # XLA finds no functions other than precast's kernels.
    for kernel in (b"precast.layers.v2", b"precast.argmax.v2", b"precast.embed.v1", b"precast.linear.v1"):
        data = data.replace(kernel, b"lapack_sgetrf_ffi"[: len(kernel)])
    put(artifact_copy, name, data)
    text = refusal("run", artifact_copy, "--target", "portable", "--compile", "--ids", "7")
    assert "lapack_sgetrf_ff" in text
    assert "'decode'" in text or "decode.stablehlo" in text


def test_fault_10_the_manifest_lists_every_custom_call_that_was_compiled_in(tiny_artifact):
    from precast import kernels
    from precast.loaders.locate import read_manifest

    for target in read_manifest(tiny_artifact).targets:
        assert set(target.kernels) <= set(kernels.targets())
        for program in target.programs:
            called = set()
            for name in filter(None, (program.executable, program.stablehlo)):
                data = (tiny_artifact / name).read_bytes()
                called |= {
                    n.decode() for n in re.findall(rb"(?:precast\.[a-z]+\.v\d+|lapack_\w+|blas_\w+)", data)
                }
            assert called <= set(target.kernels)
            assert called or not target.kernels or program.kind == "cache"


# --- 11: thousands of kernels -------------------------------------------------------------------------------


def instructions(root) -> dict[str, int]:
    """Return the number of instructions in each program's optimised HLO."""
    from precast.loaders.locate import read_manifest
    from precast.loaders.runtime import pjrt

    counts = {}
    for program in read_manifest(root).targets[0].programs:
        loaded = pjrt.client()._client.deserialize_executable(
            (root / program.executable).read_bytes(), executable_devices=pjrt.client()._devices
        )
        (module,) = loaded.hlo_modules()
        counts[program.name] = sum(" = " in line for line in module.to_string().splitlines())
    return counts


def test_fault_11_the_number_of_kernels_does_not_grow_with_depth(depths):
    shallow, deep = instructions(depths[2]), instructions(depths[12])
    assert shallow == deep
    assert set(shallow) == set(PROGRAMS)
    assert 5 < shallow["decode"] < 500
