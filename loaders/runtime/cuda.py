"""XLA's CUDA client, out of the plugin that jax's packages for NVIDIA GPUs bring, used without jax.

A plugin is a shared library with XLA's C interface in it; the Python around it, which imports jax, is left alone. What
`pjrt` says of unadvertised functions of jaxlib is true of this file too: those that only a device with a memory of its
own needs stand here, and all others there.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from threading import Lock
from typing import Any, cast

import numpy as np
from jaxlib import _jax, xla_client

from ..artifact.compat import cuda_packages
from ..artifact.errors import PrecastError
from . import pjrt
from .interface import Buffer

# What jax calls the platform, and the packages that bring it, by what they call themselves. The newer goes first.
_NAME = "cuda"
_PACKAGES = {"xla_cuda13": "jax-cuda13", "xla_cuda12": "jax-cuda12"}
_LIBRARY = "xla_cuda_plugin.so"
# NVIDIA's libraries, out of its own packages, each after those that it needs; where they are not there, the system's
# are found as usual.
_NVIDIA = "cudart nvrtc nvJitLink cublasLt cublas nccl cupti cusparse cusolver cufft nvshmem_host cudnn"


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """An installed plugin.

    Attributes:
        library: the shared library.
        version: of its package; it goes with the jaxlib of the same version.
    """

    library: Path
    version: str


def find_plugin() -> Plugin | None:
    """The installed CUDA plugin of jax; None where there is none. Nothing of it is imported or loaded."""
    from importlib.metadata import PackageNotFoundError, version

    for folder in _folders("jax_plugins"):
        for name, package in _PACKAGES.items():
            library = folder / name / _LIBRARY
            if library.is_file():
                with suppress(PackageNotFoundError):
                    return Plugin(library=library, version=version(f"{package}-pjrt"))
    return None


def _folders(package: str) -> Sequence[Path]:
    """Where a namespace package has its parts."""
    spec = PathFinder.find_spec(package)
    return [Path(p) for p in (spec.submodule_search_locations or ())] if spec is not None else []


class Executable(pjrt.Executable):
    """A program on a GPU. Calling it returns before it has run; what fails then, fails in `Client.get`."""

    def __init__(self, loaded: Any, handlers: Sequence[Any], client: "Client", *, compiled: bool) -> None:
        super().__init__(loaded, handlers, compiled=compiled)
        self._on = client

    def __call__(self, arguments: Sequence[Buffer]) -> list[Buffer]:
        """Runs the program; as `pjrt.Executable`. Arrays that `Client.staging` gave are copied over first."""
        return super().__call__([self._on.uploaded(a) if isinstance(a, np.ndarray) else a for a in arguments])

    def serialize(self) -> bytes:
        """What `Client.load` takes."""
        return bytes(self._loaded.serialize())


class Client(pjrt.Client):
    """A device with a memory of its own: what it works on is copied there, what it answers is copied back.

    Args:
        client: XLA's.
    """

    def __init__(self, client: Any) -> None:
        super().__init__(client)
        self._kinds = _jax.HostBufferSemantics

    @property
    def device_kind(self) -> str:
        """As the driver names it."""
        return str(self._device.device_kind)

    def _executable(self, loaded: Any, results: Sequence[pjrt.Result], *, compiled: bool) -> Executable:
        return Executable(loaded, self._handlers(results), self, compiled=compiled)

    def _options(self) -> Any:
        options = super()._options()
        # Where the compiler looks for NVIDIA's device library and assembler.
        for folder in _folders("nvidia"):
            for name in ("cuda_nvcc", "cu13"):
                if (folder / name).is_dir():
                    debug = options.executable_build_options.debug_options
                    debug.xla_gpu_cuda_data_dir = str(folder / name)
        return options

    def put(self, array: np.ndarray) -> Buffer:
        """Copies an array to the device. It must not change until something has been computed with it."""
        return self._put(array, self._kinds.IMMUTABLE_UNTIL_TRANSFER_COMPLETES)

    def uploaded(self, array: np.ndarray) -> Buffer:
        """Copies an array to the device. It may change as soon as this returns."""
        return self._put(array, self._kinds.IMMUTABLE_ONLY_DURING_CALL)

    def staging(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, Buffer]:
        """An array, and itself as what stands for it: an `Executable` copies it over at every call."""
        array = np.zeros(shape, dtype)
        return array, cast(Buffer, array)

    def get(self, buffer: Buffer) -> np.ndarray:
        """Waits for a buffer, and copies it to the host."""
        try:
            array, _ = cast(Any, buffer)._single_device_array_to_np_array_did_copy()
        except (_jax.JaxRuntimeError, ValueError) as error:
            raise PrecastError(f"the program failed: {error}") from None
        return cast(np.ndarray, array)


_making_client = Lock()


def client(device: str) -> Client:
    """This process's client of the first GPU.

    Args:
        device: kind that the GPU must be of, or "any".

    Raises:
        PrecastError: when the plugin is not installed, finds no GPU, or finds one of another kind.
    """
    with _making_client:
        made = _client()
    if device not in ("any", made.device_kind):
        raise PrecastError(
            f"CUDA: the executables are compiled for {device}, this machine's first GPU is {made.device_kind}; compile"
            " them here with --compile, or choose another GPU with CUDA_VISIBLE_DEVICES."
        )
    return made


@cache
def _client() -> Client:
    plugin = find_plugin()
    if plugin is None:
        raise PrecastError(
            f"CUDA: jax's plugin for NVIDIA GPUs is not installed: pip install"
            f" {cuda_packages(pjrt.jaxlib_version)}"
        )
    for library in _nvidia_libraries():
        # What cannot be loaded is missed by the plugin, if it is, which says so better.
        with suppress(OSError):
            ctypes.CDLL(str(library))
    try:
        # In a process where jax has loaded it, it is there already.
        if not xla_client.pjrt_plugin_loaded(_NAME):
            xla_client.load_pjrt_plugin_dynamically(_NAME, str(plugin.library))
        if not xla_client.pjrt_plugin_initialized(_NAME):
            xla_client.initialize_pjrt_plugin(_NAME)
        # One GPU: each that a client may see, it takes most of the memory of.
        options = {**xla_client.generate_pjrt_gpu_plugin_options(), "visible_devices": [0]}
        return Client(xla_client.make_c_api_client(_NAME, options))
    except (_jax.JaxRuntimeError, RuntimeError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise PrecastError(
            f"CUDA: XLA's plugin {plugin.version} finds no GPU that it can use ({said}); see whether nvidia-smi shows"
            " one, and whether its driver is of the plugin's CUDA or newer."
        ) from None


def _nvidia_libraries() -> Iterator[Path]:
    for name in _NVIDIA.split():
        for folder in _folders("nvidia"):
            yield from sorted(folder.glob(f"*/lib/lib{name}.so.*"))
