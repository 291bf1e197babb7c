"""The kinds of target, each with its operations, its platforms and the runtime that runs its programs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

from ..models.cpu_ops import CPU_OPS
from ..models.ops import Ops
from ..models.xla_ops import XLA_OPS
from ..programs import ProgramSpec
from .cuda import CUDA_OPS, Layouts, cuda_device, decode_layouts


@dataclass(frozen=True, kw_only=True)
class TargetKind:
    """A kind of target that an export can make.

    Attributes:
        name: the kind's name on the command line, and the name of its folder below ``programs/``.
        ops: the operations of its programs.
        runtime: "pjrt" for executables, "stablehlo" for programs that the loader compiles on request, "savedmodel"
            for TensorFlow.
        platform: the platform that the programs run on; "any" if they run on every platform in `lowered_for`.
        lowered_for: platforms for which the programs are lowered to StableHLO, by XLA's names.
        device: returns the GPU to compile for, or raises PrecastError if there is none; None for kinds without a GPU.
        layouts: returns the layouts of caches and weights that suit the decode program; None for row-major arrays.
    """

    name: str
    ops: Ops
    runtime: str
    platform: str = "cpu"
    lowered_for: tuple[str, ...] = ("cpu",)
    device: Callable[[], jax.Device] | None = None
    layouts: Callable[[ProgramSpec, jax.Device], Layouts] | None = None


TARGET_KINDS: Mapping[str, TargetKind] = {
    kind.name: kind
    for kind in (
        TargetKind(name="cpu", ops=CPU_OPS, runtime="pjrt"),
        TargetKind(
            name="portable",
            ops=XLA_OPS,
            runtime="stablehlo",
            platform="any",
            lowered_for=("cpu", "cuda", "tpu"),
        ),
        TargetKind(
            name="cuda",
            ops=CUDA_OPS,
            runtime="pjrt",
            platform="cuda",
            lowered_for=("cuda",),
            device=cuda_device,
            layouts=decode_layouts,
        ),
        TargetKind(
            name="savedmodel",
            ops=XLA_OPS,
            runtime="savedmodel",
            platform="any",
            lowered_for=("cpu", "cuda", "tpu"),
        ),
    )
}
DEFAULT_TARGETS = ("cpu", "portable")
