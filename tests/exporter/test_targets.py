"""Executables for several instruction sets in one artifact: shared files, instructions and refusals."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from precast.exporter.export import export
from precast.exporter.options import ExportOptions
from precast.exporter.reference import recording
from precast.loaders.add_target import add_target
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.machine import cpu_features, processor_family
from precast.loaders.compiling import isa
from precast.loaders.compiling.instructions import instructions
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load
from precast.loaders.locate import read_manifest
from precast.loaders.runtime.serialized import canonical, code_sections, object_files

PROMPT = [7, 200, 31]
needs_v3 = pytest.mark.skipif(
    isa.widest_level(cpu_features()) in (None, "x86-64-v2"), reason="this CPU has no level above x86-64-v2"
)
V2, V3 = "cpu-x86-64-v2", "cpu-x86-64-v3"


@pytest.fixture(scope="module")
def several(export_tiny) -> Path:
    """Export executables for two levels, and the portable form."""
    return export_tiny(buckets=(8,), weights="int8", cpu_isas=("x86-64-v2", "x86-64-v3"))


# --- several targets ----------------------------------------------------------------------------------------


def test_two_exports_are_equal_byte_for_byte(tiny_checkpoint, python, tmp_path):
    levels = ["--cpu-isa", "x86-64-v2"] if processor_family() == "x86_64" else []
    for name in ("a", "b"):
        result = python(
            *("cli.py", "export", str(tiny_checkpoint() if name == "a" else tmp_path / "checkpoint")),
            *(
                "-o",
                str(tmp_path / name),
                "--buckets",
                "8",
                "--context",
                "32",
                "--cpu-isa",
                "native",
                *levels,
            ),
            env={"SOURCE_DATE_EPOCH": "1700000000"},
        )
        assert result.returncode == 0, result.stderr
    first, second = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "a", tmp_path / "b")
    )
    assert first.keys() == second.keys()
    assert [str(name) for name in first if first[name] != second[name]] == []
    assert len([name for name in first if name.suffix == ".xla"]) in ((4, 8) if levels else (4,))


@needs_v3
def test_weights_and_stablehlo_are_stored_once_for_all_targets(several):
    manifest = read_manifest(several)
    assert [t.name for t in manifest.targets] == [V3, V2, "portable"]
    assert [p.name for p in several.rglob("*.safetensors")] == ["weights.safetensors"]
    # No other file contains weights, not even as a constant in a program.
    data = (several / "weights.safetensors").read_bytes()
    pieces = [data[at : at + 64] for at in range(len(data) // 2, len(data) - 64, len(data) // 20)]
    pieces = [piece for piece in pieces if len(set(piece)) > 20]  # padding occurs in every file
    assert len(pieces) > 5
    others = [p.read_bytes() for p in several.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    assert not any(piece in other for piece in pieces for other in others)
    compiled = [t for t in manifest.targets if t.runtime == "pjrt"]
    assert len({tuple(p.stablehlo for p in t.programs) for t in compiled}) == 1
    assert len({p.executable for t in compiled for p in t.programs}) == 4 * len(compiled)


@needs_v3
def test_all_targets_give_one_answer_and_the_widest_is_chosen(several):
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    names = [t.name for t in read_manifest(several).targets if t.runtime == "pjrt"]
    answers = {load(several, target=name).generate(PROMPT, params).token_ids for name in names}
    assert len(answers) == 1
    assert load(several).target.name == names[0]


@needs_v3
def test_a_target_records_its_level(several):
    narrow = next(t for t in read_manifest(several).targets if t.name == V2)
    assert narrow.xla_flags.endswith("--xla_cpu_max_isa=SSE4_2")
    assert narrow.cpu_features == isa.LEVELS["x86-64-v2"].features


@needs_v3
def test_native_adds_no_second_target_of_a_level(export_tiny):
    alone = export_tiny(buckets=(8,), weights="int8", targets=("cpu",), cpu_isas=("native",))
    (native,) = read_manifest(alone).targets
    assert set(native.cpu_features) <= set(cpu_features())
    level = native.name.removeprefix("cpu-")
    if level not in isa.LEVELS:
        pytest.skip(f"native gives {level} on this CPU, which is more than a level")
    root = export_tiny(buckets=(8,), weights="int8", targets=("cpu",), cpu_isas=("native", level))
    assert [t.name for t in read_manifest(root).targets] == [native.name]
    assert sorted(p.name for p in (root / "programs").iterdir()) == ["cpu"]


# --- what is in the executables -----------------------------------------------------------------------------


def disassembled(root: Path, name: str) -> Iterator:
    """Yield every instruction in the executables of a target, by an independent disassembler."""
    import capstone

    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    engine.detail = True
    target = next(t for t in read_manifest(root).targets if t.name == name)
    for program in target.programs:
        objects = object_files((root / program.executable).read_bytes())
        # The empty cache is one call of a kernel; the other programs contain compiled code.
        assert objects or program.kind == "cache"
        for section in (code for elf in objects for code in code_sections(elf)):
            found = list(engine.disasm(section, 0))
            assert sum(i.size for i in found) == len(section), "not all of it could be disassembled"
            yield from found


def groups(root: Path, name: str) -> set[str]:
    """Return the instruction sets and vector registers that a target's instructions use."""
    found = set()
    for i in disassembled(root, name):
        found |= {i.group_name(g) for g in i.groups}
        found |= set(re.findall(r"\b[xyz]mm", i.op_str))
    return found - {"novlx"}


BEYOND_V2 = {"avx", "avx2", "bmi", "bmi2", "fc16", "fma", "sse4a", "ymm", "zmm"}
BEYOND_V3 = {"avx512", "bwi", "dqi", "vlx", "cdi", "vnni", "sse4a", "fma4", "zmm"}


@needs_v3
def test_programs_hold_no_instruction_beyond_their_level(several):
    assert not groups(several, V2) & (BEYOND_V2 | BEYOND_V3)
    # Prove that the search works: executables for the next level contain such instructions.
    assert "avx" in groups(several, V3)
    assert not groups(several, V3) & BEYOND_V3


@needs_v3
def test_programs_of_pure_xla_stay_within_their_level(artifact_copy):
    """XLA has little to vectorise in programs that call kernels, so the test compiles the portable programs."""
    add_target(artifact_copy, isa="x86-64-v3", source="portable", log=lambda _: None)
    found = groups(artifact_copy, "portable-x86-64-v3")
    assert {"avx2", "bmi", "ymm"} <= found
    assert not found & BEYOND_V3
    # XLA limited to SSE 4.2 may still use some instructions of x86-64-v3; code that contains them must not count as v2.
    with pytest.raises(PrecastError) as raised:
        add_target(artifact_copy, isa="x86-64-v2", source="portable", log=lambda _: None)
    told = re.search(
        r"program '(?:prefill_\d+|decode)': XLA was asked for x86-64-v2, but used an instruction \(([0-9a-f]+)\) that"
        r" needs ([a-z0-9, ]+); use --cpu-isa x86-64-v3, or remove",
        str(raised.value),
    )
    assert told is not None
    # The first such instruction depends on the CPU that LLVM optimises for.
    (instruction,) = instructions(bytes.fromhex(told[1]))
    beyond = instruction.needs - set(isa.LEVELS["x86-64-v2"].features)
    assert told[2] == ", ".join(sorted(beyond))
    assert set() < beyond <= set(isa.LEVELS["x86-64-v3"].features)
    assert "portable-x86-64-v2" not in {t.name for t in read_manifest(artifact_copy).targets}


# --- what an executable needs -------------------------------------------------------------------------------

LEA, ANDN, VADDPS = "8d0411", "c4e248f2f2", "62f1744858c2"  # the last on zmm registers
GFNI, UNKNOWN = "c4e269cfc1", "d50000000000"  # gf2p8mulb xmm0, xmm2, xmm1; the prefix REX2, of APX


@pytest.fixture
def code(monkeypatch):
    """Replace the reader of executables with one that accepts machine code in hexadecimal digits."""
    monkeypatch.setattr(isa, "object_files", lambda data: [data])
    monkeypatch.setattr(isa, "code_sections", lambda elf: [bytes.fromhex(elf.decode())])
    monkeypatch.setattr(isa, "processor_family", lambda: "x86_64")
    monkeypatch.setattr(isa, "cpu_features", lambda: isa.LEVELS["x86-64-v4"].features)

    def needed(name: str, *programs: str) -> tuple[str, ...]:
        return isa.needed_features(name, {f"p{i}": p.encode() for i, p in enumerate(programs)}, "art")

    return needed


def test_a_level_needs_the_level_and_native_what_it_uses(code):
    for name, level in isa.LEVELS.items():
        assert code(name, LEA) == level.features
    assert code("native", LEA) == isa.LEVELS["x86-64-v2"].features
    assert code("native", LEA, ANDN) == isa.LEVELS["x86-64-v3"].features
    assert code("native", ANDN + VADDPS) == isa.LEVELS["x86-64-v4"].features
    found = code("native", ANDN, GFNI)
    assert found == tuple(sorted((*isa.LEVELS["x86-64-v3"].features, "gfni")))
    assert isa.target_name("cpu", found) == "cpu-x86-64-v3-gfni"


@pytest.mark.parametrize(
    ("level", "program", "needs", "instead"),
    [
        ("x86-64-v2", ANDN, "bmi", "x86-64-v3"),
        ("x86-64-v2", VADDPS, "avx512bw, avx512cd, avx512dq, avx512f, avx512vl", "x86-64-v4"),
        ("x86-64-v3", VADDPS, "avx512bw, avx512cd, avx512dq, avx512f, avx512vl", "x86-64-v4"),
        ("x86-64-v4", GFNI, "gfni", "native"),
    ],
)
def test_code_wider_than_its_level_is_refused(code, level, program, needs, instead):
    with pytest.raises(PrecastError) as raised:
        code(level, LEA, LEA + program)
    assert str(raised.value) == (
        f"art: program 'p1': XLA was asked for {level}, but used an instruction ({program}) that needs {needs}; use"
        f" --cpu-isa {instead}, or remove xla_cpu_max_isa from XLA_FLAGS if it is set there."
    )


def test_the_advice_names_a_level_of_this_machine(code, monkeypatch):
    monkeypatch.setattr(isa, "cpu_features", lambda: isa.LEVELS["x86-64-v2"].features)
    with pytest.raises(PrecastError, match="use --cpu-isa native, or remove"):
        code("x86-64-v2", ANDN)


def test_an_unknown_instruction_is_refused(code, monkeypatch):
    for name, advice in (("x86-64-v2", ""), ("native", " and export with --cpu-isa x86-64-v2 instead")):
        with pytest.raises(PrecastError) as raised:
            code(name, LEA + UNKNOWN)
        assert str(raised.value) == (
            f"art: program 'p0' contains an instruction that precast does not know ({UNKNOWN} at 0x3), so precast"
            f" cannot tell which CPUs run it; please report this{advice}."
        )
    monkeypatch.setattr(isa, "object_files", lambda data: None)
    with pytest.raises(PrecastError, match="program 'p0' is in a format that precast does not know"):
        code("native", LEA)


LIST = b"..+64bit,+avx,+avx2,+cmov,+crc32,+prefer-no-gather,+prefer-no-scatter,+sse,+sse2,+sse4.2,+sse4a,-avx512f.."


def test_an_executable_states_what_it_needs(monkeypatch):
    monkeypatch.setattr(isa, "processor_family", lambda: "x86_64")
    assert isa.declare_features(LIST, ("sse2", "sse4.2")) == (
        b"..+64bit,-avx,-avx2,+cmov,+crc32,-prefer-no-gather,-prefer-no-scatter,+sse,+sse2,+sse4.2,-sse4a,-avx512f.."
    )
    wide = LIST.replace(b"-avx512f", b"+avx512f")
    assert isa.declare_features(wide, ("avx512f", "sse2", "sse4.2")) == isa.declare_features(
        LIST, ("sse2", "sse4.2")
    )
    assert isa.declare_features(b"nothing", ()) == b"nothing"
    monkeypatch.setattr(isa, "processor_family", lambda: "aarch64")
    assert isa.declare_features(LIST, ()) == LIST


def test_names_of_targets_state_their_needs(monkeypatch):
    for family, names in (
        ("x86_64", ("x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v2-sse4a")),
        ("aarch64", ("aarch64",) * 4),
    ):
        monkeypatch.setattr(isa, "processor_family", lambda family=family: family)
        for name, needs in zip(names, (*isa.LEVELS.values(), None), strict=True):
            features = needs.features if needs else (*isa.LEVELS["x86-64-v2"].features, "sse4a")
            assert isa.target_name("cpu", features) == f"cpu-{name}"


# --- canonical executables ----------------------------------------------------------------------------------


def field(number: int, data: bytes) -> bytes:
    assert len(data) < 128
    return bytes([number << 3 | 2, len(data)]) + data


def executable(*objects: bytes) -> bytes:
    files = b"".join(field(8, field(1, b"\x7fELF" + o) + field(2, b"name")) for o in objects)
    return (
        b"\x02\x08\x01"
        + field(1, field(2, b"before") + files + b"\x28\x02" + field(9, b"behind"))
        + field(2, b"z")
    )


def test_object_files_are_sorted():
    assert canonical(executable(b"b", b"a", b"c")) == executable(b"a", b"b", b"c")
    assert object_files(executable(b"b", b"a")) == (b"\x7fELFb", b"\x7fELFa")


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d + b"\x07", lambda d: b"\xff" * 20, lambda d: b""]
)
def test_unknown_bytes_are_unchanged(change):
    data = change(executable(b"b", b"a"))
    assert canonical(data) == data
    assert object_files(data) is None


@needs_v3
def test_another_target_with_wrong_answers_is_not_shipped(tmp_path, tiny_source, monkeypatch):
    original = recording.replay

    def replay(model, recorded, where, progress):
        found = original(model, recorded, where, progress)
        assert found.problems == ()
        return dataclasses.replace(found, problems=(f"{where}: a token differs; {recording.DO_NOT_USE}",))

    monkeypatch.setattr(recording, "replay", replay)
    options = ExportOptions(buckets=(8,), context=64, targets=("cpu",), cpu_isas=("x86-64-v3", "x86-64-v2"))
    with pytest.raises(PrecastError) as raised:
        export(tiny_source(), tmp_path / "a", options)
    assert str(raised.value).endswith("v2': a token differs; nothing was written: please report this.")
    assert list(tmp_path.iterdir()) == []
