"""C++ kernels for CPU, called by XLA through its FFI, under versioned names (``precast.linear.v1``).

The instruction set is chosen by CPUID at run time; `force_isa` overrides it, for tests and for comparisons.
"""

from pathlib import Path

try:
    from . import _kernels
except ImportError as error:
    # Imported here, because transformers imports any package called "kernels". With a checkout on sys.path, it finds
    # this folder, and precast may not be importable.
    from precast.loaders.artifact.errors import PrecastError

    raise PrecastError(
        f"precast's kernels are not built ({error}); run: pip install -e {Path(__file__).resolve().parent.parent}"
    ) from None
from ._kernels import ABI_VERSION, force_isa, isa, targets

ISAS = ("portable", "avx2", "avx512")


def supported_isas() -> tuple[str, ...]:
    """Return the instruction sets of `ISAS` that this CPU runs, narrowest first."""
    return tuple(name for name in ISAS if _kernels.supported(name))


__all__ = ["ABI_VERSION", "ISAS", "force_isa", "isa", "supported_isas", "targets"]
