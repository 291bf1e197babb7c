"""What the engine asks of a runtime. `pjrt` and `savedmodel` are the two there are; a third offers the same.

A runtime makes a `Client` and, of a target's programs, an `Executable` each. The engine hands buffers from one call to
the next without looking inside. Device memory that the host does not see is the client's business: `staging` then gives
an array of the host's and a buffer that stands for it, which the executable copies over at every call.
"""

from collections.abc import Iterable, Sequence
from typing import NewType, Protocol

import numpy as np

# An array of a runtime. Opaque: only the module of the runtime looks inside.
Buffer = NewType("Buffer", object)


class Executable(Protocol):
    """A loaded program. Calling it runs it to the end."""

    @property
    def compiled(self) -> bool:
        """Whether it is compiled here, and not deserialised."""

    def __call__(self, arguments: Sequence[Buffer]) -> list[Buffer]:
        """Runs the program.

        Args:
            arguments: in the order of its signature in the manifest. Those that a result aliases are used up.

        Returns:
            Its results in order.

        Raises:
            PrecastError: when the program refuses the arguments.
        """


class Client(Protocol):
    """One device."""

    def put(self, array: np.ndarray) -> Buffer:
        """Hands an array to the device; the caller must not change it afterwards."""

    def staging(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, Buffer]:
        """An array and a buffer of it: what is written there between two calls, the next one sees."""

    def get(self, buffer: Buffer) -> np.ndarray:
        """A buffer's contents, not to be written to; valid until the buffer is used up by a call."""

    def free(self, buffers: Iterable[Buffer]) -> None:
        """Release buffers from `put` that no call will use again, and the arrays whose memory they share."""
