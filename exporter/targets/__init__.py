"""How programs become files. A target is a value: what computes, what is compiled, what the loader must match."""

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
        name: folder below ``programs/``, and what users call it.
        ops: how its programs compute.
        runtime: how the loader executes it: "pjrt" for executables, "stablehlo" to be compiled on request,
            "savedmodel" by TensorFlow.
        platform: what the loader must have; "any" where the programs are the same for all of `lowered_for`.
        lowered_for: platforms that its StableHLO is lowered for, in XLA's names.
        device: finds what to compile for, or says why there is none; None for where the export computes, the CPU.
        layouts: chooses layouts of caches and weights by the decode program; None for axes in order.
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
# What an export makes unless asked for something else.
DEFAULT_TARGETS = ("cpu", "portable")
