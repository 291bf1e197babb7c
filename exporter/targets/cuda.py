"""The CUDA target: XLA's own operations in bfloat16, with caches and weights laid out as decoding wants them.

Decoding is what an artifact does most, so its program is compiled first with every layout of caches and weights left
to the compiler. What it chose is then said to all programs, prefill and the empty cache included, because they hand
the same memory on. `precast.exporter.programs.arranged` says how a layout is pinned.
"""

import os
from collections.abc import Mapping
from contextlib import suppress

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from precast.loaders.artifact.errors import PrecastError

from ..models.xla_ops import xla_ops
from ..programs import ProgramSpec

# Axes from the slowest to the fastest, by name of a cache or a weight.
Layouts = Mapping[str, tuple[int, ...]]

CUDA_OPS = xla_ops("bfloat16")
# What the compiler may lay out as it likes.
_FREE = ("cache", "weight")


def cuda_device() -> jax.Device:
    """The GPU to compile for: the first one that jax sees.

    Raises:
        PrecastError: when jax sees none.
    """
    # The finished artifact is loaded in this process too, by a client of its own, and needs memory then. jax looks
    # when it first asks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # jax asserts, rather than raises, where JAX_PLATFORMS names nothing that there is.
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
    """How the compiler lays out caches and weights of a program when it is free to choose.

    Args:
        decode: the program, its own layouts all of axes in order.
        device: what to compile for.
    """
    sharding = SingleDeviceSharding(device)
    free, fixed = Format(Layout.AUTO, sharding), sharding

    def formats(values: tuple) -> tuple:
        return tuple(free if value.role in _FREE else fixed for value in values)

    function = jax.jit(
        decode.function,
        in_shardings=formats(decode.arguments),
        out_shardings=formats(decode.results),
        donate_argnums=decode.donated,
        keep_unused=True,
    )
    chosen = function.lower(*decode.abstract_arguments()).compile().input_formats[0]
    # Of a cache, argument and result share their memory, and so their layout.
    return {
        value.name: tuple(format.layout.major_to_minor)
        for value, format in zip(decode.arguments, chosen, strict=True)
        if value.role in _FREE
    }
