"""Executables for several instruction sets in one artifact: what they share, what is in them, what is refused."""

import dataclasses
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from precast.exporter import export as exporting
from precast.exporter.export import ExportOptions, check_options, export
from precast.loaders import isa
from precast.loaders.add_target import add_target
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.machine import cpu_features, processor_family
from precast.loaders.load import load, read_manifest
from precast.loaders.runtime.serialized import canonical, object_files
from precast.loaders.sampling import SamplingParams

PROMPT = [7, 200, 31]
needs_avx2 = pytest.mark.skipif("avx2" not in cpu_features(), reason="this CPU has no AVX2")
# Native gives a target of the same name as one of these; the other two are narrower on any machine with AVX2.
WIDEST = "avx512" if "avx512f" in cpu_features() else "avx2"


@pytest.fixture(scope="module")
def several(export_tiny) -> Path:
    """Executables for two instruction sets or three, and the portable form."""
    isas = ("native", "avx2", "sse4.2") if WIDEST == "avx512" else ("avx2", "sse4.2")
    return export_tiny(buckets=(8,), weights="int8", cpu_isas=isas)


# --- several targets ----------------------------------------------------------------------------------------


def test_exporting_twice_gives_the_same_bytes_of_every_file(tiny_checkpoint, python, tmp_path):
    narrower = ["--cpu-isa", "sse4.2"] if processor_family() == "x86_64" else []
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
                *narrower,
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
    assert len([name for name in first if name.suffix == ".xla"]) == (6 if narrower else 3)


@needs_avx2
def test_weights_and_stablehlo_are_stored_once_for_all_targets(several):
    manifest = read_manifest(several)
    assert {"cpu-x86_64-avx2", "cpu-x86_64-sse4.2", "portable"} <= {t.name for t in manifest.targets}
    assert len(manifest.targets) >= 3
    assert [p.name for p in several.rglob("*.safetensors")] == ["weights.safetensors"]
    # No weight is in any other file: not in a program, as a constant, either.
    data = (several / "weights.safetensors").read_bytes()
    pieces = [data[at : at + 64] for at in range(len(data) // 2, len(data) - 64, len(data) // 20)]
    pieces = [piece for piece in pieces if len(set(piece)) > 20]  # padding is anywhere
    assert len(pieces) > 5
    others = [p.read_bytes() for p in several.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    assert not any(piece in other for piece in pieces for other in others)
    compiled = [t for t in manifest.targets if t.runtime == "pjrt"]
    assert len({tuple(p.stablehlo for p in t.programs) for t in compiled}) == 1
    assert len({p.executable for t in compiled for p in t.programs}) == 3 * len(compiled)


@needs_avx2
def test_all_targets_answer_alike_and_the_widest_is_taken(several):
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    names = [t.name for t in read_manifest(several).targets if t.runtime == "pjrt"]
    answers = {load(several, target=name).generate(PROMPT, params).token_ids for name in names}
    assert len(answers) == 1
    assert load(several).target.name == names[0]


@needs_avx2
def test_a_target_says_what_it_was_held_to(several):
    target = next(t for t in read_manifest(several).targets if t.name == "cpu-x86_64-sse4.2")
    assert target.xla_flags.endswith("--xla_cpu_max_isa=SSE4_2")
    assert "sse4.2" in target.cpu_features
    assert not {"avx", "avx2", "fma", "f16c"} & set(target.cpu_features)
    # Instructions that XLA never makes a compiler emit are nothing that a machine must have.
    assert not {"aes", "sha", "vaes"} & set(target.cpu_features)


# --- what is in the executables -----------------------------------------------------------------------------


def code_sections(elf: bytes) -> Iterator[bytes]:
    """Contents of an ELF object's sections that hold instructions (ELF-64: System V gABI, chapter 4)."""
    offset, entry_bytes, count = struct.unpack_from("<Q10xHH", elf, 0x28)
    for i in range(count):
        _, kind, flags, _, start, size = struct.unpack_from("<IIQQQQ", elf, offset + i * entry_bytes)
        if kind == 1 and flags & 4:  # SHT_PROGBITS, SHF_EXECINSTR
            yield elf[start : start + size]


def instructions(root: Path, name: str) -> Iterator:
    """Every instruction in the executables of a target, disassembled."""
    import capstone

    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    target = next(t for t in read_manifest(root).targets if t.name == name)
    for program in target.programs:
        objects = object_files((root / program.executable).read_bytes())
        # Making an empty cache is one call of a kernel; the others are compiled code.
        assert objects or program.kind == "cache"
        for section in (code for elf in objects for code in code_sections(elf)):
            found = list(engine.disasm(section, 0))
            assert sum(i.size for i in found) == len(section), "not all of it could be disassembled"
            yield from found


def kinds(root: Path, name: str) -> set[str]:
    """How the vector instructions of a target are encoded, and which vector registers they use."""
    found = set()
    for i in instructions(root, name):
        first = bytes(i.bytes).lstrip(b"\x26\x2e\x36\x3e\x64\x65\x67")[0]
        # VEX also encodes BMI's instructions on plain registers, whose names have no v in front.
        if first in (0xC4, 0xC5) and i.mnemonic.startswith("v"):
            found.add("VEX")
        if first == 0x62:
            found.add("EVEX")
        found |= set(re.findall(r"\b[xyz]mm", i.op_str))
    return found


@needs_avx2
def test_what_is_compiled_for_sse_holds_no_avx_instruction(several):
    assert kinds(several, "cpu-x86_64-sse4.2") == {"xmm"}
    # That others would be found: what is compiled for AVX2 has them.
    assert "VEX" in kinds(several, "cpu-x86_64-avx2")


@needs_avx2
def test_what_is_compiled_for_avx2_holds_no_avx512_instruction(several):
    assert not {"EVEX", "zmm"} & kinds(several, "cpu-x86_64-avx2")


@needs_avx2
def test_nor_do_programs_that_are_all_xla(artifact_copy):
    """Those that call kernels leave XLA little to vectorise; the portable ones leave it everything."""
    for name in ("sse4.2", "avx2"):
        add_target(artifact_copy, isa=name, source="portable", log=lambda _: None)
    assert kinds(artifact_copy, "portable-x86_64-sse4.2") == {"xmm"}
    assert kinds(artifact_copy, "portable-x86_64-avx2") == {"VEX", "xmm", "ymm"}


def test_avx512_instructions_would_be_found(tmp_path, monkeypatch):
    """The check itself, on machine code written by hand: vaddps zmm0, zmm1, zmm2; and vpaddd ymm17{k1}, ymm1, ymm2."""
    code = bytes.fromhex("62f1744858c2" + "62e17529fecac3")
    monkeypatch.setitem(globals(), "object_files", lambda data: [data])
    monkeypatch.setitem(globals(), "code_sections", lambda elf: iter([elf]))
    program = SimpleNamespace(executable="x", kind="decode")
    manifest = SimpleNamespace(targets=[SimpleNamespace(name="t", programs=[program])])
    monkeypatch.setitem(globals(), "read_manifest", lambda root: manifest)
    (tmp_path / "x").write_bytes(code)
    assert kinds(tmp_path, "t") == {"EVEX", "ymm", "zmm"}


# --- what is refused ----------------------------------------------------------------------------------------


def refusal(**options) -> str:
    with pytest.raises(PrecastError) as raised:
        check_options(ExportOptions(**options))
    return str(raised.value)


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine another one."""

    def be(family, *features) -> None:
        monkeypatch.setattr(isa, "processor_family", lambda: family)
        monkeypatch.setattr(isa, "cpu_features", lambda: features)

    return be


def test_instruction_sets_that_cannot_be_had_are_refused(machine):
    machine("x86_64", "sse4.2", "avx", "avx2")
    assert refusal(cpu_isas=("mmx",)) == (
        "--cpu-isa: 'mmx' is not known, expected one of native, sse4.2, avx, avx2, avx512."
    )
    text = refusal(cpu_isas=("avx2", "avx512"))
    assert text.startswith("--cpu-isa: avx512 is wider than this machine, which lacks avx512f")
    assert text.endswith("copy the artifact there and run precast add-target --cpu-isa avx512.")
    assert refusal(cpu_isas=("native", "sse4.2", "avx2")) == (
        "--cpu-isa: native and avx2 make the same target on this machine; name one of them."
    )
    assert "each once, found one of them twice" in refusal(cpu_isas=("avx2", "avx2"))
    assert "each once, found none" in refusal(cpu_isas=())
    assert refusal(cpu_isas=("avx2",), targets=("portable",)) == (
        "--cpu-isa: only the target cpu is compiled for it; add --target cpu."
    )
    check_options(ExportOptions(cpu_isas=("native", "sse4.2", "avx")))
    machine("aarch64", "neon")
    assert refusal(cpu_isas=("avx2",)).startswith(
        "--cpu-isa: avx2 is an instruction set of x86_64, this machine is aarch64; leave it out"
    )
    check_options(ExportOptions(cpu_isas=("native",)))


# --- what an executable needs -------------------------------------------------------------------------------

LIST = b" +avx,+avx2,+sse2,+sse4.2,+sse4a,+aes,+64bit,+fma,-avx512f,-gfni "


def test_what_came_out_wider_than_asked_is_refused():
    isa.check_not_wider("avx2", [LIST], "x")
    isa.check_not_wider("native", [LIST], "x")
    with pytest.raises(
        PrecastError, match=r"^x: XLA was asked for avx and allowed itself avx2, fma; is another"
    ):
        isa.check_not_wider("avx", [LIST], "x")
    with pytest.raises(PrecastError, match="allowed itself avx512f"):
        isa.check_not_wider("avx2", [LIST.replace(b"-avx512f", b"+avx512f")], "x")
    with pytest.raises(PrecastError, match="do not say which CPU features they use"):
        isa.check_not_wider("avx2", [b"nothing"], "x")


def test_what_a_machine_must_have():
    assert isa.needed_features([LIST]) == ("avx", "avx2", "fma", "sse2", "sse4.2")
    # Instructions of one maker's CPUs are needed where bytes look like them: extrq, movntss, gf2p8mulb in three ways.
    for code in ("66410f79c1", "f3410f2b00"):
        assert "sse4a" in isa.needed_features([LIST + bytes.fromhex(code)])
    other = LIST.replace(b"-gfni", b"+gfni")
    assert "gfni" not in isa.needed_features([other])
    for code in ("660f38cfc1", "c4e269cfc1", "62f26d48cfc1"):
        assert "gfni" in isa.needed_features([other + bytes.fromhex(code)])
    # Of several programs all; and this machine's own where none says.
    assert "f16c" in isa.needed_features([LIST, LIST.replace(b"+fma", b"+f16c")])
    assert isa.needed_features([b"nothing"]) == cpu_features()


def test_names_say_the_widest():
    family = processor_family()
    assert isa.target_name("cpu", ("avx", "avx2", "sse4.2")) == f"cpu-{family}-avx2"
    assert isa.target_name("cpu", ("avx512f", "avx2")) == f"cpu-{family}-avx512f"
    assert isa.target_name("portable", ()) == f"portable-{family}"


# --- the same bytes -----------------------------------------------------------------------------------------


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


def test_object_files_are_put_in_order():
    assert canonical(executable(b"b", b"a", b"c")) == executable(b"a", b"b", b"c")
    assert object_files(executable(b"b", b"a")) == (b"\x7fELFb", b"\x7fELFa")


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d + b"\x07", lambda d: b"\xff" * 20, lambda d: b""]
)
def test_what_is_not_understood_is_left_alone(change):
    data = change(executable(b"b", b"a"))
    assert canonical(data) == data
    assert object_files(data) == ()


def test_a_further_target_that_answers_otherwise_is_not_shipped(tmp_path, tiny_source, monkeypatch):
    original = exporting.replay

    def replay(model, recorded, where, report):
        found = original(model, recorded, where, report)
        assert found.problems == ()
        return dataclasses.replace(found, problems=(f"{where}: a token differs; {exporting.OTHERWISE}",))

    monkeypatch.setattr(exporting, "replay", replay)
    options = ExportOptions(buckets=(8,), context=64, targets=("cpu",), cpu_isas=("native", "sse4.2"))
    with pytest.raises(PrecastError) as raised:
        export(tiny_source(), tmp_path / "a", options)
    assert str(raised.value).endswith("sse4.2': a token differs; nothing was written: please report this.")
    assert list(tmp_path.iterdir()) == []
