"""XLA's CUDA client, loaded without jax from the plugin in jax's packages for NVIDIA GPUs.

A plugin is a shared library with XLA's C interface. The Python package around the plugin imports jax, so this module
does not import that package. Like `pjrt`, this module calls private functions of jaxlib.
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
from jaxlib.version import __version__ as jaxlib_version

from ..artifact.compat import cuda_packages
from ..artifact.errors import PrecastError
from . import pjrt
from .interface import Buffer

# jax's name for the platform.
_NAME = "cuda"
# The prefix of each plugin's package name, by the plugin's module, newest first.
_PACKAGES = {"xla_cuda13": "jax-cuda13", "xla_cuda12": "jax-cuda12"}
_LIBRARY = "xla_cuda_plugin.so"
# The libraries in NVIDIA's Python packages, each after its dependencies. If a package is missing, the linker looks for
# the library in the system's folders.
_NVIDIA = "cudart nvrtc nvJitLink cublasLt cublas nccl cupti cusparse cusolver cufft nvshmem_host cudnn"


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """An installed plugin.

    Attributes:
        library: path of the shared library.
        version: version of the plugin's package, which equals the version of the matching jaxlib.
    """

    library: Path
    version: str


def find_plugin() -> Plugin | None:
    """Find jax's installed CUDA plugin without importing or loading it; return None if no plugin is installed."""
    from importlib.metadata import PackageNotFoundError, version

    for folder in _folders("jax_plugins"):
        for name, package in _PACKAGES.items():
            library = folder / name / _LIBRARY
            if library.is_file():
                with suppress(PackageNotFoundError):
                    return Plugin(library=library, version=version(f"{package}-pjrt"))
    return None


def _folders(package: str) -> Sequence[Path]:
    """Return the folders of a namespace package."""
    spec = PathFinder.find_spec(package)
    return [Path(p) for p in (spec.submodule_search_locations or ())] if spec is not None else []


class Executable(pjrt.Executable):
    """A program on a GPU. A call returns before the program has finished; `Client.get` raises the program's errors."""

    def __init__(
        self, loaded: Any, handlers: Sequence[Any], where: str, client: "Client", *, compiled: bool
    ) -> None:
        super().__init__(loaded, handlers, where, compiled=compiled)
        self._on = client

    def __call__(self, arguments: Sequence[Buffer]) -> list[Buffer]:
        """Run the program, as `pjrt.Executable` does, after copying the arrays of `Client.staging` to the GPU."""
        return super().__call__([self._on.uploaded(a) if isinstance(a, np.ndarray) else a for a in arguments])

    def serialize(self) -> bytes:
        """Serialise the program for `Client.load`."""
        return bytes(self._loaded.serialize())


class Client(pjrt.Client):
    """A device with separate memory: arguments are copied to it, and results are copied back.

    Args:
        client: XLA's client.
    """

    def __init__(self, client: Any) -> None:
        super().__init__(client)
        self._kinds = _jax.HostBufferSemantics

    @property
    def device_kind(self) -> str:
        """The driver's name for the device."""
        return str(self._device.device_kind)

    def _executable(
        self, loaded: Any, results: Sequence[pjrt.Result], where: str, *, compiled: bool
    ) -> Executable:
        return Executable(loaded, self._handlers(results), where, self, compiled=compiled)

    def _options(self) -> Any:
        options = super()._options()
        # The compiler needs NVIDIA's device library and assembler.
        for folder in _folders("nvidia"):
            for name in ("cuda_nvcc", "cu13"):
                if (folder / name).is_dir():
                    debug = options.executable_build_options.debug_options
                    debug.xla_gpu_cuda_data_dir = str(folder / name)
        return options

    def put(self, array: np.ndarray) -> Buffer:
        """Start copying an array to the device. The array must not change before a computation has used the copy."""
        return self._put(array, self._kinds.IMMUTABLE_UNTIL_TRANSFER_COMPLETES)

    def uploaded(self, array: np.ndarray) -> Buffer:
        """Copy an array to the device. The array may change as soon as this method returns."""
        return self._put(array, self._kinds.IMMUTABLE_ONLY_DURING_CALL)

    def staging(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, Buffer]:
        """Return a zeroed array twice: to write to, and as the buffer that every call of an `Executable` copies."""
        array = np.zeros(shape, dtype)
        return array, cast(Buffer, array)

    def view(self, buffer: Buffer) -> np.ndarray | None:
        """Return None, because the host cannot reach the GPU's memory."""

    def get(self, buffer: Buffer) -> np.ndarray:
        """Wait until a buffer has been computed, and copy it to the host.

        Raises:
            PrecastError: the program that computes the buffer fails.
        """
        try:
            array, _ = cast(Any, buffer)._single_device_array_to_np_array_did_copy()
        except (_jax.JaxRuntimeError, ValueError) as error:
            raise PrecastError(
                f"CUDA: a program failed on the GPU ({error}); check the GPU with nvidia-smi, and the artifact with"
                " precast verify."
            ) from None
        return cast(np.ndarray, array)


_making_client = Lock()


def client(device: str) -> Client:
    """Return this process's client for the first GPU.

    Args:
        device: expected kind of the GPU, or "any".

    Raises:
        PrecastError: the plugin is not installed, it finds no GPU, or the GPU is of another kind.
    """
    with _making_client:
        made = _client()
    if device not in ("any", made.device_kind):
        raise PrecastError(
            f"CUDA: the executables are compiled for {device}, but this machine's first GPU is"
            f" {made.device_kind}; compile them here with --compile, or choose another GPU with"
            " CUDA_VISIBLE_DEVICES."
        )
    return made


@cache
def _client() -> Client:
    plugin = find_plugin()
    if plugin is None:
        raise PrecastError(
            f"CUDA: jax's plugin for NVIDIA GPUs is not installed: pip install"
            f" {cuda_packages(jaxlib_version)}"
        )
    for library in _nvidia_libraries():
        # Ignore a library that cannot be loaded. If the plugin needs the library, the plugin's own error is more
        # precise.
        with suppress(OSError):
            ctypes.CDLL(str(library))
    try:
        # jax may have loaded the plugin in this process.
        if not xla_client.pjrt_plugin_loaded(_NAME):
            xla_client.load_pjrt_plugin_dynamically(_NAME, str(plugin.library))
        if not xla_client.pjrt_plugin_initialized(_NAME):
            xla_client.initialize_pjrt_plugin(_NAME)
        # Make only one GPU visible, because a client reserves most of the memory of every visible GPU.
        options = {**xla_client.generate_pjrt_gpu_plugin_options(), "visible_devices": [0]}
        return Client(xla_client.make_c_api_client(_NAME, options))
    except (_jax.JaxRuntimeError, RuntimeError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise PrecastError(
            f"CUDA: XLA's plugin {plugin.version} finds no GPU that it can use ({said}); check that nvidia-smi shows"
            " a GPU, and that the GPU's driver is new enough for the plugin's version of CUDA."
        ) from None


def _nvidia_libraries() -> Iterator[Path]:
    for name in _NVIDIA.split():
        for folder in _folders("nvidia"):
            yield from sorted(folder.glob(f"*/lib/lib{name}.so.*"))
