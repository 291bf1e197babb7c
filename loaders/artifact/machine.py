"""What this machine is, from the standard library alone."""

import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from .frozen import Frozen

# Names of /proc/cpuinfo that LLVM spells differently; the rest are alike.
_LLVM_NAMES = {
    "abm": "lzcnt",
    "bmi1": "bmi",
    "lahf_lm": "sahf",
    "pclmulqdq": "pclmul",
    "pni": "sse3",
    "rdrand": "rdrnd",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "sha_ni": "sha",
    "avx512_bf16": "avx512bf16",
    "avx512_bitalg": "avx512bitalg",
    "avx512_fp16": "avx512fp16",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512_vnni": "avx512vnni",
    "avx512_vp2intersect": "avx512vp2intersect",
    "avx512_vpopcntdq": "avx512vpopcntdq",
    "avx_vnni": "avxvnni",
    "amx_bf16": "amx-bf16",
    "amx_fp16": "amx-fp16",
    "amx_int8": "amx-int8",
    "amx_tile": "amx-tile",
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fullfp16",
    "atomics": "lse",
}

# What a compiler for this family may emit. Everything else in /proc/cpuinfo (power, virtualisation, timers) does
# not decide whether code runs.
CODEGEN_FEATURES = frozenset(
    """
    adx aes amx-bf16 amx-fp16 amx-int8 amx-tile avx avx2 avx512bf16 avx512bitalg avx512bw avx512cd avx512dq
    avx512f avx512fp16 avx512ifma avx512vbmi avx512vbmi2 avx512vl avx512vnni avx512vp2intersect avx512vpopcntdq
    avxvnni bmi bmi2 cx16 f16c fma fma4 gfni lzcnt movbe pclmul popcnt rdrnd rdseed sahf sha sse sse2 sse3 sse4.1
    sse4.2 sse4a ssse3 tbm vaes vpclmulqdq xop
    bf16 dotprod fullfp16 i8mm lse neon sve sve2
    """.split()
)


# Features that say how wide a CPU's vectors are, widest first.
VECTOR_FEATURES = ("avx512f", "avx2", "avx", "sse4.2", "sve2", "neon")


def vector_width(features: Iterable[str]) -> int:
    """A rank of instruction sets: the wider the vectors, the larger."""
    known = set(features)
    return next((len(VECTOR_FEATURES) - i for i, f in enumerate(VECTOR_FEATURES) if f in known), 0)


class Machine(Frozen):
    """The machine that programs run on.

    Attributes:
        machine: processor family ("x86_64").
        features: of the CPU, in LLVM's names, sorted.
        jaxlib: installed version.
        kernel_abi: of precast's kernels.
        kernels: custom-call targets they offer.
        tensorflow: whether TensorFlow is installed.
        gpus: kinds of NVIDIA's that the driver names; "any" where it is there and does not tell; none where they are
            hidden from this process, or nobody asked.
        cuda_plugin: installed version of jax's plugin for them; empty where it is not installed or of no use.
    """

    machine: str
    features: tuple[str, ...]
    jaxlib: str
    kernel_abi: int
    kernels: tuple[str, ...]
    tensorflow: bool = False
    gpus: tuple[str, ...] = ()
    cuda_plugin: str = ""


def nvidia_gpus(root: Path = Path("/")) -> tuple[str, ...]:
    """Kinds of NVIDIA's GPUs, as their driver names them, without asking it; none where CUDA_VISIBLE_DEVICES hides all.

    "any" alone where there is a driver that does not tell by files, as in Windows' Linux. What a process may use of
    them only a client of the driver's knows.
    """
    # The first that is no device ends the list.
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip() in ("", "-1"):
        return ()
    kinds = []
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        with suppress(OSError):
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            kinds += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    if kinds:
        return tuple(sorted(set(kinds)))
    signs = ("dev/nvidiactl", "dev/dxg")
    return ("any",) if any((root / sign).exists() for sign in signs) else ()


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_family() -> str:
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


@cache
def cpu_features() -> tuple[str, ...]:
    """Features of the CPU that compiled code may use; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ()
    return parse_cpu_features(text)


def parse_cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """Return the features in the contents of /proc/cpuinfo."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            names = {_LLVM_NAMES.get(name, name) for name in value.split()}
            return tuple(sorted(names & CODEGEN_FEATURES))
    return ()
