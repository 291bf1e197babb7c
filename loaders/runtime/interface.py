"""The interface between the engine and the runtimes `pjrt`, `cuda` and `savedmodel`.

A runtime provides a `Client`, and an `Executable` for each program of a target. The engine passes buffers from one call
to the next without inspecting them. If a device has separate memory, `staging` returns an array in the host's memory
and a placeholder for a buffer. The executable then copies the array to the device at every call.
"""

from collections.abc import Iterable, Sequence
from typing import NewType, Protocol

import numpy as np

# An array that belongs to a runtime. It is opaque to all code outside the runtime's module.
Buffer = NewType("Buffer", object)


class Executable(Protocol):
    """A loaded program."""

    @property
    def compiled(self) -> bool:
        """True if this process or its child compiles the program, False if the program is deserialised."""

    def __call__(self, arguments: Sequence[Buffer]) -> list[Buffer]:
        """Run the program.

        Args:
            arguments: arguments in the order of the manifest's signature. A call consumes every argument that a result
                aliases.

        Returns:
            The results in the order of the signature.

        Raises:
            PrecastError: the program refuses the arguments.
        """


class Client(Protocol):
    """A client for one device."""

    def put(self, array: np.ndarray) -> Buffer:
        """Hand an array to the device. The caller must not change the array afterwards."""

    def staging(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, Buffer]:
        """Return a zeroed array and its buffer. A call with this buffer reads the array's current values."""

    def get(self, buffer: Buffer) -> np.ndarray:
        """Return a buffer's contents as a read-only array, which is valid until a call consumes the buffer."""

    def view(self, buffer: Buffer) -> np.ndarray | None:
        """Return the writable memory of a buffer, uint8 [bytes], valid until a call consumes the buffer.

        Return None if the host cannot reach the memory.
        """

    def free(self, buffers: Iterable[Buffer]) -> None:
        """Release buffers from `put` that no call will use again, and the arrays whose memory they share."""
