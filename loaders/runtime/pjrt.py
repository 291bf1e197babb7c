"""XLA's CPU client from jaxlib, used without jax.

In the loaders, only this module and `cuda` call private functions of jaxlib, so only these two modules may need changes
for a new jaxlib. The tests run on each supported jaxlib.
"""

import ctypes
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from threading import Lock
from typing import Any, cast

import numpy as np

from ..artifact.errors import PrecastError
from ..artifact.machine import usable_cores
from .native_libraries import check_cpu, quiet, variable

try:
    # XLA reads the log level once, when it is loaded.
    check_cpu()
    with quiet("1"):
        from jaxlib import _jax
except ImportError as error:
    raise PrecastError(
        f"jaxlib cannot be imported ({error}); install it again, or raise the address-space limit (ulimit -v) if one"
        " is set."
    ) from None
from jaxlib.version import __version__ as jaxlib_version

from precast import kernels

from ..artifact.frozen import Frozen
from ..artifact.manifest import ProgramMemory
from ..artifact.weights import aligned_zeros
from .interface import Buffer

# An argument for the result handlers of older jaxlibs. It turns off checks that need jax's Python code. Newer handlers
# have no such checks.
_UNCHECKED = (True,) if "_skip_checks" in (_jax.array_result_handler.__doc__ or "") else ()


class Result(Frozen):
    """The type of a result, with the attributes that jaxlib needs to create an array.

    Attributes:
        shape: sizes of the axes in order.
        dtype: type of the elements.
        weak_type: jax's mark for types of Python scalars; always False here.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    weak_type: bool = False


def _major_to_minor(layout: Any) -> tuple[int, ...]:
    """Return the axes of a layout from slowest to fastest; XLA writes them from fastest to slowest: {2,1,0}."""
    return tuple(int(axis) for axis in reversed(str(layout).strip("{}").split(",")) if axis)


class Executable:
    """A loaded program. A call returns when the program has finished.

    Attributes:
        compiled: True if this process or its child compiled the program, False if the program was deserialised.
    """

    def __init__(self, loaded: Any, handlers: Sequence[Any], where: str, *, compiled: bool) -> None:
        self._loaded = loaded
        self._handlers = handlers
        self._where = where
        self.compiled = compiled

    def __call__(self, arguments: Sequence[Buffer]) -> list[Buffer]:
        """Run the program.

        Args:
            arguments: arguments in the order of the signature. A call consumes every argument that a result aliases.

        Returns:
            The results in the order of the signature.

        Raises:
            PrecastError: the program or one of its kernels refuses the arguments.
        """
        try:
            results = self._loaded.execute_sharded(list(arguments))
            # jaxlib creates these arrays without importing jax, because the handlers know the results' types.
            return list(results.consume_with_handlers(self._handlers))
        except (_jax.JaxRuntimeError, ValueError) as error:
            raise PrecastError(
                f"{self._where}: the program failed ({error}); check the artifact with precast verify."
            ) from None

    def serialize(self) -> bytes:
        """Serialise the program for `Client.load`. Two compilations of a program have the same serialised bytes."""
        from .serialized import canonical

        return canonical(bytes(self._loaded.serialize()))

    def memory(self) -> ProgramMemory:
        """Return the memory that a call needs, as reported by the compiler."""
        stats = self._loaded.get_compiled_memory_stats()
        return ProgramMemory(
            arguments=stats.argument_size_in_bytes,
            results=stats.output_size_in_bytes,
            aliased=stats.alias_size_in_bytes,
            temporary=stats.temp_size_in_bytes,
        )

    def layouts(self) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Return the layouts of arguments and of results: axes from the slowest to the fastest in memory."""
        arguments, results = self._loaded.get_parameter_layouts(), self._loaded.get_output_layouts()
        return [_major_to_minor(a) for a in arguments], [_major_to_minor(r) for r in results]


class Client:
    """The CPU as one device.

    Args:
        client: XLA's client.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._device = self._client.local_devices()[0]
        self._devices = _jax.DeviceList((self._device,))
        self._sharding = placement(self._device)

    def _executable(
        self, loaded: Any, results: Sequence[Result], where: str, *, compiled: bool
    ) -> Executable:
        return Executable(loaded, self._handlers(results), where, compiled=compiled)

    def _handlers(self, results: Sequence[Result]) -> list[Any]:
        return [_jax.array_result_handler(r, self._sharding, True, *_UNCHECKED) for r in results]

    def _options(self) -> Any:
        """Return the compiler's options."""
        return _jax.CompileOptions()

    def load(self, serialized: bytes, results: Sequence[Result], where: str) -> Executable:
        """Load a serialised executable, without tracing or compiling.

        Args:
            serialized: the serialised executable.
            results: types of the program's results.
            where: name of the program in messages.

        Raises:
            PrecastError: XLA refuses the executable.
        """
        try:
            loaded = self._client.deserialize_executable(serialized, executable_devices=self._devices)
        except (_jax.JaxRuntimeError, ValueError, RuntimeError) as error:
            raise PrecastError(
                f"{where}: XLA does not load this executable ({error}); export the model again with jaxlib"
                f" {jaxlib_version}."
            ) from None
        return self._executable(loaded, results, where, compiled=False)

    def compile(self, stablehlo: bytes, results: Sequence[Result], where: str) -> Executable:
        """Compile a StableHLO portable artifact. The other arguments are those of `load`.

        Raises:
            PrecastError: XLA refuses the StableHLO.
        """
        try:
            loaded = self._client.compile_and_load(stablehlo, self._devices, self._options())
        except (_jax.JaxRuntimeError, ValueError, RuntimeError) as error:
            raise PrecastError(
                f"{where}: jaxlib {jaxlib_version} does not compile this StableHLO ({error}); export the model again."
            ) from None
        return self._executable(loaded, results, where, compiled=True)

    def put(self, array: np.ndarray) -> Buffer:
        """Hand an array to the device: zero-copy if it starts on a 64-byte boundary, else as a copy.

        The caller must not change the array afterwards.
        """
        return self._put(array, _jax.HostBufferSemantics.ZERO_COPY)

    def _put(self, array: np.ndarray, semantics: Any) -> Buffer:
        # Unlike jaxlib's other functions that create arrays, this function accepts the array's type, and so imports no
        # jax.
        about = Result(shape=array.shape, dtype=array.dtype)
        made = _jax.batched_device_put(
            about,
            self._sharding,
            [array],
            [self._device],
            committed=True,
            host_buffer_semantics=semantics,
            enable_x64=True,
        )
        return cast(Buffer, made)

    def free(self, buffers: Iterable[Buffer]) -> None:
        """Release buffers that no call will use again, and the arrays whose memory they share."""
        for buffer in buffers:
            cast(Any, buffer).delete()
        # XLA keeps the arrays until their collection is requested.
        _jax.collect_garbage()

    def staging(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, Buffer]:
        """Return a zeroed array and a buffer that shares its memory. A call with the buffer reads the current values.

        Creating a buffer takes longer than running a small program. So a caller creates the buffers of its inputs once,
        and writes new values into the arrays before each call.
        """
        array = aligned_zeros(shape, dtype)
        return array, self.put(array)

    def view(self, buffer: Buffer) -> np.ndarray | None:
        """Return the writable memory of a buffer, uint8 [bytes], valid until a call consumes the buffer."""
        # Use only the address, because an array that refers to the buffer would prevent a call from consuming the
        # buffer.
        memory = (ctypes.c_uint8 * size_of(buffer)).from_address(cast(Any, buffer).unsafe_buffer_pointer())
        return np.frombuffer(memoryview(memory), np.uint8)

    def get(self, buffer: Buffer) -> np.ndarray:
        """Return a read-only view of a buffer, valid until a call consumes the buffer; bfloat16 is not supported."""
        return np.asarray(memoryview(cast(Any, buffer)))


def placement(device: Any) -> Any:
    """Return the sharding that places arrays on one device."""
    if not hasattr(_jax, "HloSharding"):
        return _jax.SingleDeviceSharding(device)

    class Placement(_jax.SingleDeviceSharding):
        """A sharding with the two attributes of jax's `SingleDeviceSharding` that older jaxlibs read."""

        memory_kind = None

        def _to_xla_hlo_sharding(self, _: int) -> Any:
            return _jax.HloSharding.replicate()

    return Placement(device)


def size_of(buffer: Buffer) -> int:
    """Return a buffer's actual size in bytes, independent of its declared type."""
    size: int = buffer.on_device_size_in_bytes()  # type: ignore[attr-defined]
    return size


@cache
def register_kernels() -> None:
    """Register precast's kernels with XLA in this process, before programs that call them are loaded."""
    for name, handler in kernels.targets().items():
        # Avoid xla_client, whose import takes 4 ms.
        _jax.register_custom_call_target(name, handler, "cpu", 1)


_making_client = Lock()
_clients: dict[int, Client] = {}


def client(threads: int | None = None) -> Client:
    """Return this process's client for a number of threads. Models with the same number of threads share a client.

    Args:
        threads: number of computing threads; None for one thread per usable core.
    """
    with _making_client:
        count = threads or usable_cores()
        if count not in _clients:
            _clients[count] = _client(count)
        return _clients[count]


def has_client(threads: int) -> bool:
    """Return True if this process already has a client with this many threads."""
    return threads in _clients


def _client(threads: int) -> Client:
    register_kernels()
    # XLA starts a thread per core. If NPROC is set when a client is created, XLA starts that number of threads instead.
    with nullcontext() if threads == usable_cores() else variable("NPROC", str(threads)):
        # A synchronous call computes on the calling thread. The caller has nothing else to do meanwhile, and passing
        # each step to another thread would take extra time.
        return Client(_jax.get_tfrt_cpu_client(asynchronous=False))
