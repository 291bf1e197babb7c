"""How programs become files. A target is a value: what computes, what is compiled, what the loader must match."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..models.cpu_ops import CPU_OPS
from ..models.ops import Ops
from ..models.xla_ops import XLA_OPS


@dataclass(frozen=True, kw_only=True)
class TargetKind:
    """A kind of target that an export can make.

    Attributes:
        name: folder below ``programs/``, and what users call it.
        ops: how its programs compute.
        runtime: how the loader executes it: "pjrt" for executables, "stablehlo" to be compiled on request.
    """

    name: str
    ops: Ops
    runtime: str


TARGET_KINDS: Mapping[str, TargetKind] = {
    kind.name: kind
    for kind in (
        TargetKind(name="cpu", ops=CPU_OPS, runtime="pjrt"),
        TargetKind(name="portable", ops=XLA_OPS, runtime="stablehlo"),
    )
}
