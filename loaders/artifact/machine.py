"""Describe this machine with the standard library alone."""

import os
import platform
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from .frozen import Frozen

# LLVM's names of features that /proc/cpuinfo spells differently.
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

# Features that determine the instructions of compiled code. The others in /proc/cpuinfo concern power,
# virtualisation or timers.
CODEGEN_FEATURES = frozenset(
    """
    adx aes amx-bf16 amx-fp16 amx-int8 amx-tile avx avx2 avx512bf16 avx512bitalg avx512bw avx512cd avx512dq
    avx512f avx512fp16 avx512ifma avx512vbmi avx512vbmi2 avx512vl avx512vnni avx512vp2intersect avx512vpopcntdq
    avxvnni bmi bmi2 cx16 f16c fma fma4 gfni lzcnt movbe pclmul popcnt rdrnd rdseed sahf sha sse sse2 sse3 sse4.1
    sse4.2 sse4a ssse3 tbm vaes vpclmulqdq xop
    bf16 dotprod fullfp16 i8mm lse neon sve sve2
    """.split()
)


# Fields of /proc/cpuinfo that identify a processor, on x86-64 and on AArch64.
_MODEL_KEYS = (
    *("model name", "vendor_id", "cpu family", "model", "stepping"),
    *("CPU implementer", "CPU part", "CPU variant", "CPU revision"),
)

# Features that imply the width of a CPU's vectors, widest first.
VECTOR_FEATURES = ("avx512f", "avx2", "avx", "sse4.2", "sve2", "neon")


def vector_width(features: Iterable[str]) -> int:
    """Return a rank for the vector width of an instruction set. A larger rank is wider; 0 means unknown."""
    known = set(features)
    return next((len(VECTOR_FEATURES) - i for i, f in enumerate(VECTOR_FEATURES) if f in known), 0)


class Machine(Frozen):
    """The machine that runs programs.

    Attributes:
        machine: processor family ("x86_64").
        features: CPU features in LLVM's names, sorted.
        jaxlib: installed version of jaxlib.
        kernel_abi: ABI version of precast's installed kernels.
        kernels: custom-call targets of precast's installed kernels.
        isa: instruction set that these kernels chose ("avx2").
        tensorflow: True if TensorFlow is installed.
        gpus: NVIDIA GPU models, as `nvidia_gpus` returns them; empty if there is no GPU or no target needs one.
        cuda_plugin: installed version of jax's CUDA plugin; empty if it is missing or no target needs it.
    """

    machine: str
    features: tuple[str, ...]
    jaxlib: str
    kernel_abi: int
    kernels: tuple[str, ...]
    isa: str = "portable"
    tensorflow: bool = False
    gpus: tuple[str, ...] = ()
    cuda_plugin: str = ""


def nvidia_gpus(root: Path = Path("/")) -> tuple[str, ...]:
    """Return the models of NVIDIA GPUs, read from the driver's files without loading the driver.

    If the driver has no such files, as under WSL, the result is ("any",). If CUDA_VISIBLE_DEVICES hides every GPU, the
    result is empty. If the variable hides only some GPUs, the result still includes all of them.

    Args:
        root: root of the file system.
    """
    # CUDA ignores the first invalid device in the list and all devices after it, so an invalid first one hides every
    # GPU.
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip() in ("", "-1"):
        return ()
    models = []
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        with suppress(OSError):
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
            models += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    if models:
        return tuple(sorted(set(models)))
    device_files = ("dev/nvidiactl", "dev/dxg")
    return ("any",) if any((root / file).exists() for file in device_files) else ()


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_family() -> str:
    """Return the processor family, such as "x86_64" or "aarch64"."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


@cache
def cpu_features() -> tuple[str, ...]:
    """Return the CPU features that compiled code may use, in LLVM's names; empty if there is no /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ()
    return parse_cpu_features(text)


def processor_model(root: Path = Path("/")) -> str:
    """Return the vendor, model and revision of the first processor; empty if there is no /proc/cpuinfo."""
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    first = (line.partition(":") for line in text.strip().split("\n\n")[0].splitlines())
    found = {key.strip(): value.strip() for key, _, value in first}
    return ", ".join(f"{key} {found[key]}" for key in _MODEL_KEYS if key in found)


def parse_cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """Return the features in the contents of /proc/cpuinfo, in LLVM's names, sorted."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            names = {_LLVM_NAMES.get(name, name) for name in value.split()}
            return tuple(sorted(names & CODEGEN_FEATURES))
    return ()
