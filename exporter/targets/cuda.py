"""The CUDA target: XLA's own operations in bfloat16, with caches and weights laid out for decoding.

Generation spends most of its time in the decode program. That program is therefore compiled first, and the compiler
chooses the layouts of caches and weights for it. All programs use these layouts, because they share caches and weights.
`precast.exporter.programs.with_layouts` applies the layouts.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest import Value

from ..models.xla_ops import xla_ops
from ..programs import ProgramSpec

# The layout of each cache array and each weight, by name: the axes from the slowest to the fastest.
Layouts = Mapping[str, tuple[int, ...]]

CUDA_OPS = xla_ops("bfloat16")
# Roles of the values whose layouts the compiler chooses.
_FREE = ("cache", "weight")


def cuda_device() -> jax.Device:
    """Return the GPU to compile for: the first one that jax sees.

    Raises:
        PrecastError: jax sees no GPU.
    """
    # This process later loads the finished artifact with a second client, which needs GPU memory too. jax reads the
    # variable when it first lists devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # jax fails an assertion if JAX_PLATFORMS names only missing platforms.
    with suppress(RuntimeError, AssertionError):
        return jax.devices("cuda")[0]
    found = "nothing"
    with suppress(RuntimeError, AssertionError):
        found = ", ".join(sorted({device.platform for device in jax.devices()}))
    raise PrecastError(
        f"--target cuda needs a GPU that jax sees; jax sees {found}. Export on a machine with an NVIDIA GPU and"
        f" jax's CUDA plugin: pip install 'jax[cuda12]=={jax.__version__}'"
    )


def decode_layouts(decode: ProgramSpec, device: jax.Device) -> Layouts:
    """Compile the decode program with layouts of the compiler's choice, and return these layouts.

    Args:
        decode: the program, with row-major arguments and results.
        device: the device to compile for.
    """
    sharding = SingleDeviceSharding(device)
    free, fixed = Format(Layout.AUTO, sharding), sharding

    def formats(values: Sequence[Value]) -> tuple[object, ...]:
        return tuple(free if value.role in _FREE else fixed for value in values)

    function = jax.jit(
        decode.function,
        in_shardings=formats(decode.arguments),
        out_shardings=formats(decode.results),
        donate_argnums=decode.donated,
        keep_unused=True,
    )
    chosen = function.lower(*decode.abstract_arguments()).compile().input_formats[0]
    # A cache's argument and result share their memory and therefore their layout.
    return {
        value.name: tuple(memory.layout.major_to_minor)
        for value, memory in zip(decode.arguments, chosen, strict=True)
        if value.role in _FREE
    }
