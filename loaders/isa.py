"""Instruction sets that XLA's compiler can be held to, and what its executables then need of a CPU.

precast's own kernels are no part of this: they are in the wheel, for every instruction set they know, and choose one
by CPUID when they run.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .artifact.errors import PrecastError
from .artifact.machine import CODEGEN_FEATURES, VECTOR_FEATURES, cpu_features, processor_family
from .runtime.serialized import object_files

NATIVE = "native"


@dataclass(frozen=True, kw_only=True)
class Isa:
    """An instruction set.

    Attributes:
        flag: what XLA's ``xla_cpu_max_isa`` calls it.
        needs: the feature, in LLVM's names, that a machine which has it has.
        beyond: features, as a regular expression, that nothing compiled for it may use.
    """

    flag: str
    needs: str
    beyond: str


# By the name that users give. XLA knows no others; on other processors than x86_64 it knows none.
ISAS: Mapping[str, Isa] = {
    "sse4.2": Isa(flag="SSE4_2", needs="sse4.2", beyond=r"avx.*|fma4?|f16c|xop|amx.*"),
    "avx": Isa(flag="AVX", needs="avx", beyond=r"avx.+|fma4?|xop|amx.*"),
    "avx2": Isa(flag="AVX2", needs="avx2", beyond=r"avx(512|10).*|amx.*"),
    "avx512": Isa(flag="AVX512", needs="avx512f", beyond=r"avx10.*|amx.*"),
}

# How LLVM spells a machine inside an executable: "+avx,+avx2,-avx512f,…".
_FEATURE_LIST = re.compile(rb"(?:[+-][a-z0-9._-]+,){4,}[+-][a-z0-9._-]+")
_ENABLED = re.compile(rb"(?<![a-z0-9._-])\+([a-z0-9._-]+)")
# A compiler emits these only for functions that name them (cryptography, random numbers, carry chains); XLA has none.
_NEVER_EMITTED = frozenset("adx aes pclmul rdrnd rdseed sha vaes vpclmulqdq".split())
# What one maker's CPUs have and others of the same age lack, and how its instructions begin. Bytes that only look so
# keep the feature on the list; where none do, no such instruction is there.
_SSE4A = rb"[\x66\xf2][\x40-\x4f]?\x0f[\x78\x79]|[\xf2\xf3][\x40-\x4f]?\x0f\x2b"
# As it stands, and behind a VEX prefix (maps 2 and 3, 66) or an EVEX one.
_GFNI = (
    rb"\x0f\x38\xcf|\x0f\x3a[\xce\xcf]"
    rb"|\xc4[\x02\x03\x22\x23\x42\x43\x62\x63\x82\x83\xa2\xa3\xc2\xc3\xe2\xe3]%s[\xce\xcf]|\x62...[\xce\xcf]"
) % (b"[" + re.escape(bytes(range(1, 256, 4))) + b"]")
_RARE: Mapping[str, re.Pattern[bytes]] = {
    "sse4a": re.compile(_SSE4A, re.DOTALL),
    "gfni": re.compile(_GFNI, re.DOTALL),
}


def check_isa(name: str) -> None:
    """Refuses an instruction set that is unknown, or that this machine cannot try what is compiled for it on.

    Raises:
        PrecastError: naming the option, and what to do.
    """
    if name == NATIVE:
        return
    if name not in ISAS:
        raise PrecastError(f"--cpu-isa: {name!r} is not known, expected one of {', '.join((NATIVE, *ISAS))}.")
    if processor_family() != "x86_64":
        raise PrecastError(
            f"--cpu-isa: {name} is an instruction set of x86_64, this machine is {processor_family()}; leave it out"
            " (native), or add the target on a machine that has it: precast add-target."
        )
    if ISAS[name].needs not in cpu_features():
        raise PrecastError(
            f"--cpu-isa: {name} is wider than this machine, which lacks {ISAS[name].needs}, so its programs could"
            " not be checked here; export on a machine that has it, or copy the artifact there and run precast"
            f" add-target --cpu-isa {name}."
        )


def same_as_native(names: Iterable[str]) -> str | None:
    """Which of these instruction sets gives a target of the same name as this machine's own; None where none does."""
    widest = next((f for f in VECTOR_FEATURES if f in cpu_features()), None)
    return next((name for name in names if name in ISAS and ISAS[name].needs == widest), None)


def expected_features(name: str) -> tuple[str, ...] | None:
    """Features, among them the widest, that a compilation will use; None where XLA_FLAGS has a say in it."""
    if "xla_cpu_max_isa" in os.environ.get("XLA_FLAGS", ""):
        return None
    return cpu_features() if name == NATIVE else (ISAS[name].needs,)


def xla_flags(isa: str, flags: str) -> str:
    """`flags`, the value of XLA_FLAGS, with what holds XLA to an instruction set. XLA looks when it is loaded."""
    return flags if isa == NATIVE else f"{flags} --xla_cpu_max_isa={ISAS[isa].flag}".strip()


def check_not_wider(isa: str, executables: Iterable[bytes], where: str) -> None:
    """Looks at what came out of the compiler.

    Raises:
        PrecastError: when it was allowed to use more than was asked for.
    """
    if isa == NATIVE:
        return
    enabled = {name for data in executables for name in _enabled(data)}
    if not enabled:
        raise PrecastError(
            f"{where}: the executables do not say which CPU features they use, so --cpu-isa {isa} cannot be checked;"
            " export without it."
        )
    if wider := sorted(name for name in enabled if re.fullmatch(ISAS[isa].beyond, name)):
        raise PrecastError(
            f"{where}: XLA was asked for {isa} and allowed itself {', '.join(wider)}; is another xla_cpu_max_isa set"
            " in XLA_FLAGS?"
        )


def needed_features(executables: Sequence[bytes]) -> tuple[str, ...]:
    """CPU features that a machine must have to run these executables, in LLVM's names.

    All that LLVM was allowed to use and may emit by itself, but for those few whose instructions are demonstrably
    not there. What this machine has, where the executables do not say.
    """
    needed = {name for data in executables for name in _needed(data)}
    return tuple(sorted(needed)) or cpu_features()


def _needed(executable: bytes) -> set[str]:
    code = object_files(executable) or (executable,)
    absent = {name for name, begin in _RARE.items() if not any(map(begin.search, code))}
    return (_enabled(executable) & CODEGEN_FEATURES) - _NEVER_EMITTED - absent


def _enabled(executable: bytes) -> set[str]:
    return {n.decode() for list_ in _FEATURE_LIST.findall(executable) for n in _ENABLED.findall(list_)}


def target_name(kind: str, features: Sequence[str]) -> str:
    """What a compiled target is called: ``cpu-x86_64-avx2``."""
    widest = next((f for f in VECTOR_FEATURES if f in features), None)
    return "-".join(filter(None, (kind, processor_family(), widest)))
