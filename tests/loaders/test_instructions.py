"""Lengths and features of instructions, compared with capstone's for every opcode of every map."""

from collections.abc import Iterator

import pytest

from precast.loaders.compiling.instructions import AVX512, UnknownInstruction, instructions

capstone = pytest.importorskip("capstone")

# Features by capstone's groups. If capstone names no group, precast's tables are checked less strictly.
GROUPS = {
    "sse3": {"sse3"},
    "ssse3": {"ssse3"},
    "sse41": {"sse4.1"},
    "sse42": {"sse4.2"},
    "sse4a": {"sse4a"},
    "avx": {"avx"},
    "avx2": {"avx2"},
    "fc16": {"f16c"},
    "bmi": {"bmi"},
    "bmi2": {"bmi2"},
    "fma": {"fma"},
    "fma4": {"fma4"},
    "avx512": AVX512,
    "bwi": AVX512,
    "dqi": AVX512,
    "cdi": AVX512,
    "vlx": AVX512,
}
# Groups that every level has, or that compilers never emit.
OTHERS = {
    "sse1",
    "sse2",
    "cmov",
    "mmx",
    "3dnow",
    "fpu",
    "novlx",
    "mode64",
    "not64bitmode",
    "jump",
    "call",
    "ret",
}
OTHERS |= {"branch_relative", "int", "privilege", "vm", "iret"}
# Register and memory operands of every size of displacement.
MODRM = (0xC1, 0x01, 0x41, 0x81, 0x04, 0x05, 0x44, 0xD9, 0x84)
REST = bytes.fromhex("112233445566770809")
# capstone decodes these instructions differently from CPUs, which ignore their operand-size prefixes.
EXCEPT = ("ret", "vmread", "vmwrite")


def plain(prefix: bytes) -> Iterator[bytes]:
    for rex in (b"", b"\x48"):
        for escape in (b"", b"\x0f", b"\x0f\x38", b"\x0f\x3a"):
            prefixes = b"\x66\xf2\xf3\xf0\x26\x2e\x36\x3e\x64\x65\x67\xc4\xc5\x62\x0f" + bytes(
                range(0x40, 0x50)
            )
            for opcode in (n for n in range(256) if escape or n not in prefixes):
                yield prefix + rex + escape + bytes([opcode])


def vex(prefix: int) -> Iterator[bytes]:
    for map_ in (1, 2, 3):
        for bits in (0x78, 0x7C, 0xF8, 0xFC):  # without and with W and L
            for opcode in range(256):
                yield bytes([0xC4, 0xE0 | map_, bits | prefix, opcode])


def evex(prefix: int) -> Iterator[bytes]:
    for map_ in (1, 2, 3):
        for bits in (0x7C, 0xFC):
            for length in (0x08, 0x28, 0x48):
                for opcode in range(256):
                    yield bytes([0x62, 0xF0 | map_, bits | prefix, length, opcode])


KINDS = {f"plain-{p.hex()}": list(plain(p)) for p in (b"", b"\x66", b"\xf3", b"\xf2")}
KINDS |= {f"vex-{p}": list(vex(p)) for p in range(4)} | {f"evex-{p}": list(evex(p)) for p in range(4)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_opcode_agrees_with_capstone_or_is_unknown(kind):
    engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    engine.detail = True
    known = 0
    for start in KINDS[kind]:
        for modrm in MODRM:
            code = start + bytes([modrm]) + REST
            expected = next(engine.disasm(code, 0), None)
            try:
                found = next(instructions(code))
            except UnknownInstruction:
                continue
            if expected is None or expected.mnemonic in EXCEPT:
                continue  # an encoding that no CPU decodes, so compilers never emit it
            known += 1
            assert len(found.raw) == expected.size, f"{code.hex()}: {expected.mnemonic}"
            for group in map(expected.group_name, expected.groups):
                assert group in OTHERS or GROUPS[group] <= found.needs, f"{code.hex()}: {expected.mnemonic}"
    assert known > 100


@pytest.mark.parametrize(
    ("code", "needs"),
    [
        ("c3", ()),
        ("660f6fc1", ()),
        ("f20f12c1", ("sse3",)),
        ("f30fb8c1", ("popcnt",)),
        ("0fbcc1", ()),
        ("f30fbcc1", ("bmi",)),  # tzcnt; an older CPU decodes it as bsf, with other results
        ("f30fbdc1", ("lzcnt",)),
        ("9f", ("sahf",)),
        ("480fc70f", ("cx16",)),
        ("0fc70f", ()),
        ("0f38f00f", ("movbe",)),
        ("c5f877", ("avx",)),
        ("c5f1fec2", ("avx",)),
        ("c5f5fec2", ("avx", "avx2")),
        ("c4e2791801", ("avx",)),  # vbroadcastss from memory
        ("c4e27918c1", ("avx", "avx2")),  # the same from a register
        ("c4e27913c1", ("avx", "f16c")),
        ("c4e27198c2", ("avx", "fma")),
        ("c4e248f2f2", ("bmi",)),
        ("c4e2fbf6c1", ("bmi2",)),
        ("c4e27150c2", ("avx", "avxvnni")),
        ("c4e269cfc1", ("avx", "gfni")),
        ("62f1744858c2", tuple(AVX512)),
        ("62f2754850c2", (*AVX512, "avx512vnni")),
        ("62f2765852c2", (*AVX512, "avx512bf16")),
        ("c5f892c8", tuple(AVX512)),  # kmovw
    ],
)
def test_features_of_an_instruction(code, needs):
    (found,) = instructions(bytes.fromhex(code))
    assert (found.offset, found.raw.hex(), found.needs) == (0, code, frozenset(needs))


@pytest.mark.parametrize(
    "code",
    [
        "d5000000",  # REX2, of APX
        "8fe97800c1",  # XOP
        "0f01f8",  # swapgs
        "62f5745858c2",  # AVX512-FP16's maps
        "660f3adfc101",  # aeskeygenassist
        "c4e2",  # an end within an instruction
        "b801",
    ],
)
def test_an_unknown_instruction_is_an_error(code):
    with pytest.raises(UnknownInstruction, match=f"^{code} at 0x1$"):
        list(instructions(b"\x90" + bytes.fromhex(code)))
