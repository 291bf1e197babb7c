"""Determine the CPU features that x86-64 machine code needs.

The decoder determines only the length of each instruction and the features that the instruction needs. It covers the
code that LLVM emits. Its tables are an allowlist: an unlisted instruction raises an error that shows its bytes. So an
instruction of a new CPU is never mistaken for an instruction of an older CPU. Encodings and features follow Intel's
Software Developer's Manual, volume 2, and AMD's Programmer's Manual, volumes 3 and 4. The tests compare every opcode
with the output of the disassembler capstone.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

# The feature that every x86-64 CPU has.
_BASE = "base"
# The features that EVEX and opmask instructions need. They count as one feature, because every CPU except one Xeon Phi
# has either all of them or none.
AVX512 = frozenset({"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"})
_AVX512_CODE = "avx512"

_PREFIXES = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")
_LONGEST = 15
# Mandatory prefixes, numbered as VEX and EVEX encode them.
_NONE, _66, _F3, _F2 = range(4)

# The opcodes of an opcode map, grouped by the feature that they need.
_Map = Mapping[str, frozenset[int]]


class UnknownInstruction(Exception):
    """Machine code that the tables do not list. The message shows its first bytes."""


class Instruction(NamedTuple):
    """An instruction: its offset in the code, its bytes, and the CPU features that it needs, in LLVM's names."""

    offset: int
    raw: bytes
    needs: frozenset[str]


def _set(ranges: str) -> frozenset[int]:
    """Parse opcodes written as "10-17 2b"."""
    ends = (part.partition("-")[::2] for part in ranges.split())
    return frozenset(n for first, last in ends for n in range(int(first, 16), int(last or first, 16) + 1))


def _map(**opcodes: str) -> _Map:
    """Return the opcodes by feature. A keyword is a feature's name with "_" in place of "."."""
    return {name.replace("_", "."): _set(ranges) for name, ranges in opcodes.items()}


# --- opcodes of one byte, which every x86-64 CPU has -----------------------------------------------------------

_ONE_BYTE = _set(
    "00-05 08-0d 10-15 18-1d 20-25 28-2d 30-35 38-3d 50-5f 63 68-7f 80-81 83-99 9b-9f a4-c3 c6-c7 c9 cc d0-d3 d8-df"
    " e3 e8-e9 eb f5-f9 fc-ff"
)
_ONE_BYTE_MODRM = _set(
    "00-03 08-0b 10-13 18-1b 20-23 28-2b 30-33 38-3b 63 69 6b 80-81 83-8f c0-c1 c6-c7 d0-d3 d8-df f6-f7 fe-ff"
)
_ONE_BYTE_IMM8 = _set("04 0c 14 1c 24 2c 34 3c 6a 6b 70-7f 80 83 a8 b0-b7 c0-c1 c6 e3 eb")
# Opcodes with an immediate of four bytes. With the prefix 66 the immediate has two bytes, except for calls and jumps.
_ONE_BYTE_IMM32 = _set("05 0d 15 1d 25 2d 35 3d 68 69 81 a9 b8-bf c7 e8-e9")
_MOV_IMM64, _RET_IMM16, _TEST, _BRANCHES, _SAHF = (
    _set("b8-bf"),
    0xC2,
    _set("f6-f7"),
    _set("e8-e9"),
    _set("9e-9f"),
)

# --- opcodes after 0F, 0F 38 and 0F 3A, by mandatory prefix --------------------------------------------------

_ANY_PREFIX = _set("18-1f")  # hints, which older CPUs ignore
_INTEGER = _set("0b 31 40-4f 80-9f a2-a5 ab-ad ae-b1 b3 b6-b7 ba-c1 c7-cf")
_NO_MODRM, _JUMPS, _FENCES, _CMPXCHG = _set("0b 31 77 80-8f a2 c8-cf"), _set("80-8f"), 0xAE, 0xC7
_IMM8 = _set("70-73 a4 ac ba c2 c4-c6")
_EXTRQ = 0x78  # has two bytes of immediate operands
_LEGACY: Mapping[tuple[int, int], _Map] = {
    (1, _NONE): _map(base="10-17 28-2f 50-6b 6e-77 7e-7f c2-c6 d1-d5 d7-e5 e7-ef f1-fe"),
    (1, _66): _map(
        base="10-17 28-2f 50-51 54-70 71-76 7e-7f c2 c4-c6 d1-ef f1-fe", sse3="7c-7d d0", sse4a="78-79"
    ),
    (1, _F3): _map(
        base="10-11 2a 2c-2d 51-53 58-5f 6f-70 7e-7f c2 d6 e6",
        sse3="12 16",
        sse4a="2b",
        popcnt="b8",
        bmi="bc",
        lzcnt="bd",
    ),
    (1, _F2): _map(base="10-11 2a 2c-2d 51 58-5a 5c-5f 70 c2 d6 e6", sse3="12 7c-7d d0 f0", sse4a="2b 78-79"),
    (2, _NONE): _map(ssse3="00-0b 1c-1e", movbe="f0-f1"),
    (2, _66): _map(
        ssse3="00-0b 1c-1e",
        sse4_1="10 14-15 17 20-25 28-2b 30-35 38-41",
        sse4_2="37",
        movbe="f0-f1",
        gfni="cf",
    ),
    (2, _F2): _map(sse4_2="f0-f1"),
    (3, _NONE): _map(ssse3="0f"),
    (3, _66): _map(ssse3="0f", sse4_1="08-0e 14-17 20-22 40-42", sse4_2="60-63", gfni="ce-cf"),
}

# --- opcodes after a VEX prefix ------------------------------------------------------------------------------

# The key for integer instructions, which need AVX for xmm registers and AVX2 for ymm registers.
_BY_WIDTH = "avx or avx2"
_VEX: Mapping[tuple[int, int], _Map] = {
    (1, _NONE): _map(avx="10-17 28-29 2b 2e-2f 50-5f 77 c2 c6", avx512="41-42 44-47 4a-4b 90-93 98-99"),
    (1, _66): {
        **_map(
            avx="10-17 28-29 2b 2e-2f 50-51 54-5f 6e-6f 7c-7f c2 c4-c6 d0 d6 e6-e7",
            avx512="41-42 44-47 4a-4b 90-93 98-99",
        ),
        _BY_WIDTH: _set("60-6d 70-76 d1-d5 d7-e5 e8-ef f1-fe"),
    },
    (1, _F3): {**_map(avx="10-12 16 2a 2c-2d 51-53 58-5f 6f 7e-7f c2 e6"), _BY_WIDTH: _set("70")},
    (1, _F2): {
        **_map(avx="10-12 2a 2c-2d 51 58-5a 5c-5f 7c-7d c2 d0 e6 f0", avx512="92-93"),
        _BY_WIDTH: _set("70"),
    },
    (2, _NONE): _map(bmi="f2-f3 f7", bmi2="f5"),
    (2, _66): {
        **_map(
            avx="0c-0f 17-1a 2c-2f",
            avx2="16 36 45-47 58-5a 78-79 8c 8e 90-93",
            f16c="13",
            fma="96-9f a6-af b6-bf",
            bmi2="f7",
            avxvnni="50-53",
            gfni="cf",
        ),
        _BY_WIDTH: _set("00-0b 1c-1e 20-25 28-2b 30-35 37-41"),
    },
    (2, _F3): _map(bmi2="f5 f7"),
    (2, _F2): _map(bmi2="f5-f7"),
    (3, _66): {
        **_map(
            avx="04-06 08-0d 14-19 20-22 40-41 4a-4b 60-63",
            avx2="00-02 38-39 46",
            f16c="1d",
            fma4="5c-5f 68-6f 78-7f",
            avx512="30-33",
            gfni="ce-cf",
        ),
        _BY_WIDTH: _set("0e-0f 42 4c"),
    },
    (3, _F2): _map(bmi2="f0"),
}
# Broadcasts, which need AVX if the source is memory and AVX2 if it is a register.
_BROADCASTS = _set("18-19")
_VZEROUPPER = 0x77

# --- opcodes after an EVEX prefix ----------------------------------------------------------------------------

_EVEX: Mapping[tuple[int, int], _Map] = {
    (1, _NONE): _map(avx512="10-17 28-29 2b 2e-2f 51 54-5f 78-79 c2 c6"),
    (1, _66): _map(avx512="10-17 28-29 2b 2e-2f 51 54-70 71-76 78-7b 7e-7f c2 c4-c6 d1-d6 d8-ef f1-f6 f8-fe"),
    (1, _F3): _map(avx512="10-12 16 2a 2c-2d 51 58-5f 6f-70 78-7b 7e-7f c2 e6"),
    (1, _F2): _map(avx512="10-12 2a 2c-2d 51 58-5a 5c-5f 6f-70 78-7b 7f c2 e6"),
    (2, _66): _map(
        avx512="00 04 0b-16 18-1f 20-28 2a-2d 30-40 42-47 4c-4f 58-5b 64-66 76-7c 7e-7f 88-8b 90-93 96-9f a0-a3"
        " a6-af b6-bf c4",
        avx512vnni="50-53",
        avx512bitalg="54 8f",
        avx512vpopcntdq="55",
        avx512vbmi2="62-63 70-73",
        avx512vbmi="83",
        avx512ifma="b4-b5",
        gfni="cf",
    ),
    (2, _F3): _map(avx512="10-15 20-2a 30-35 38-3a", avx512bf16="52 72"),
    (2, _F2): _map(avx512bf16="72", avx512vp2intersect="68"),
    (3, _66): _map(
        avx512="00-01 03-05 08-0b 0f 14-1b 1d-23 25-27 38-3b 3e-3f 42-43 50-51 54-57 66-67",
        avx512vbmi2="70-73",
        gfni="ce-cf",
    ),
}
# Permutes. With the W bit they move words. Without it they move bytes, which needs a later extension (VBMI).
_PERMUTES = _set("75 7d 8d")


def instructions(code: bytes) -> Iterator[Instruction]:
    """Yield the instructions of a section of code, in order.

    Raises:
        UnknownInstruction: an instruction is not listed, or the code ends within it.
    """
    at = 0
    while at < len(code):
        reader = _Reader(code, at)
        try:
            needs = reader.instruction()
        except (IndexError, KeyError):
            raise UnknownInstruction(f"{code[at : at + _LONGEST].hex()} at {at:#x}") from None
        yield Instruction(at, code[at : reader.at], needs - {_BASE})
        at = reader.at


class _Reader:
    """A decoder of one instruction, byte by byte. IndexError and KeyError mean an unknown instruction."""

    def __init__(self, code: bytes, at: int) -> None:
        self._code, self.at = code, at
        self._prefixes: set[int] = set()
        self._wide = False  # REX.W

    def instruction(self) -> frozenset[str]:
        """Read an instruction; return the features that it needs."""
        byte = self._byte()
        while byte in _PREFIXES:
            self._prefixes.add(byte)
            byte = self._byte()
        if byte in (0xC4, 0xC5, 0x62):
            needs = self._evex() if byte == 0x62 else self._vex(byte)
        else:
            if byte & 0xF0 == 0x40:  # REX
                self._wide = bool(byte & 8)
                byte = self._byte()
            needs = frozenset({self._escaped() if byte == 0x0F else self._one_byte(byte)})
        if self.at > len(self._code):
            raise IndexError
        return needs

    def _byte(self) -> int:
        self.at += 1
        return self._code[self.at - 1]

    def _peek(self) -> int:
        return self._code[self.at]

    def _mandatory(self) -> int:
        if 0xF2 in self._prefixes:
            return _F2
        if 0xF3 in self._prefixes:
            return _F3
        return _66 if 0x66 in self._prefixes else _NONE

    def _modrm(self) -> int:
        """Read a ModRM byte with its SIB byte and displacement."""
        modrm = self._byte()
        mod, rm = modrm >> 6, modrm & 7
        if mod != 3:
            base = self._byte() & 7 if rm == 4 else rm
            self.at += (4 if base == 5 else 0, 1, 4)[mod]
        return modrm

    def _one_byte(self, opcode: int) -> str:
        if opcode not in _ONE_BYTE or (opcode == 0x8F and self._peek() & 0x38):  # 8F is also XOP's prefix
            raise KeyError(opcode)
        operand = self._peek() >> 3 & 7 if opcode in _TEST else 0
        if opcode in _ONE_BYTE_MODRM:
            self._modrm()
        self.at += opcode in _ONE_BYTE_IMM8 or (opcode == 0xF6 and operand < 2)
        if opcode in _ONE_BYTE_IMM32 or (opcode == 0xF7 and operand < 2):
            short = 0x66 in self._prefixes and opcode not in _BRANCHES and not self._wide
            self.at += 8 if opcode in _MOV_IMM64 and self._wide else 2 if short else 4
        self.at += 2 * (opcode == _RET_IMM16)
        return "sahf" if opcode in _SAHF else _BASE

    def _escaped(self) -> str:
        """Read the rest of an instruction after the escape byte 0F."""
        opcode, map_, prefix = self._byte(), 1, self._mandatory()
        if opcode in (0x38, 0x3A):
            map_ = 2 if opcode == 0x38 else 3
            return self._plain(map_, self._byte(), prefix)
        if opcode in _ANY_PREFIX:
            self._modrm()
            return _BASE
        if opcode in _INTEGER and prefix in (_NONE, _66):
            return self._integer(opcode, prefix)
        return self._plain(1, opcode, prefix)

    def _integer(self, opcode: int, prefix: int) -> str:
        if opcode in _NO_MODRM:
            if opcode in _JUMPS and prefix == _66:  # Intel's and AMD's CPUs decode it differently
                raise KeyError(opcode)
            self.at += 4 * (opcode in _JUMPS)
            return _BASE
        modrm = self._modrm()
        self.at += opcode in _IMM8
        if opcode not in (_FENCES, _CMPXCHG):
            return _BASE
        is_register, operation = modrm >= 0xC0, modrm >> 3 & 7
        if prefix == _NONE and opcode == _FENCES and (is_register == (operation > 4) or operation == 7):
            return _BASE  # fences, fxsave, ldmxcsr and related instructions, clflush
        if opcode == _CMPXCHG and not is_register and operation == 1:
            return "cx16" if self._wide else _BASE
        raise KeyError(opcode)

    def _plain(self, map_: int, opcode: int, prefix: int) -> str:
        feature = _feature(_LEGACY[map_, prefix], opcode)
        if map_ > 1 or opcode not in _NO_MODRM:
            self._modrm()
        self.at += map_ == 3 or (map_ == 1 and opcode in _IMM8)
        self.at += 2 * (map_ == 1 and opcode == _EXTRQ)
        return feature

    def _vex(self, first: int) -> frozenset[str]:
        if self._prefixes & {0x66, 0xF2, 0xF3, 0xF0}:
            raise KeyError(first)
        map_ = self._byte() & 0x1F if first == 0xC4 else 1
        last, opcode = self._byte(), self._byte()
        long, prefix = bool(last & 4), last & 3
        feature = _feature(_VEX[map_, prefix], opcode)
        from_register = False
        if (map_, opcode) != (1, _VZEROUPPER):
            from_register = self._modrm() >= 0xC0
        self.at += map_ == 3 or (map_ == 1 and opcode in _IMM8)
        if feature == _BY_WIDTH:
            feature = "avx2" if long else "avx"
        if map_ == 2 and opcode in _BROADCASTS:
            feature = "avx2" if from_register else "avx"
        if feature == _AVX512_CODE:
            return AVX512
        return frozenset({feature} if feature in ("bmi", "bmi2") else {feature, "avx"})

    def _evex(self) -> frozenset[str]:
        if self._prefixes & {0x66, 0xF2, 0xF3, 0xF0}:
            raise KeyError(0x62)
        first, second, _, opcode = (self._byte() for _ in range(4))
        map_, prefix = first & 0xF, second & 3
        feature = _feature(_EVEX[map_, prefix], opcode)
        if map_ == 2 and opcode in _PERMUTES and not second & 0x80:
            feature = "avx512vbmi"
        self._modrm()
        self.at += map_ == 3 or (map_ == 1 and opcode in _IMM8)
        return AVX512 | ({feature} - {_AVX512_CODE})


def _feature(opcodes: _Map, opcode: int) -> str:
    for feature, known in opcodes.items():
        if opcode in known:
            return feature
    raise KeyError(opcode)
