"""The tensors that store one quantised weight of a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from precast.loaders.artifact.errors import PrecastError

FLOATS = ("F32", "F16", "BF16")
# Endings of the names of masks and tables in old checkpoints. These tensors may have any type, because no architecture
# reads their values.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".self_attn.bias", ".inv_freq", "position_ids")
REMEDY = "fetch the checkpoint again"
# The remedy for a quantised checkpoint that precast cannot read.
ORIGINAL = "export the original checkpoint in bfloat16, float16 or float32"


@dataclass(frozen=True, kw_only=True)
class RawTensor:
    """A tensor of a checkpoint, before any conversion.

    Attributes:
        where: path of the file, for messages.
        shape: shape of the tensor.
        dtype: safetensors' name of the type, such as "F16", "I32" or "F8_E4M3".
        read: returns the array in this type.
    """

    where: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


class Parts:
    """The tensors that store one quantised weight.

    Args:
        left: the checkpoint's tensors that no weight has taken yet. Taking a tensor removes it from this dictionary.
        base: the common beginning of the tensors' names.
    """

    def __init__(self, left: dict[str, RawTensor], base: str) -> None:
        self._left, self.base = left, base

    def take(self, ending: str, dtypes: tuple[str, ...], axes: int | None = 2) -> RawTensor:
        """Remove and return the tensor with this ending.

        Args:
            ending: the end of the tensor's name.
            dtypes: the permitted types.
            axes: the required number of axes; None for any.

        Raises:
            PrecastError: the tensor is missing, or has another type or number of axes.
        """
        tensor = self.find(ending, dtypes, axes)
        if tensor is None:
            raise PrecastError(
                f"{self.base}: the quantised weight lacks its tensor {ending[1:]!r}; {REMEDY}."
            )
        return tensor

    def find(self, ending: str, dtypes: tuple[str, ...], axes: int | None = 2) -> RawTensor | None:
        """Remove and return the tensor with this ending, as `take` does; return None if it is missing."""
        tensor = self._left.pop(self.base + ending, None)
        if tensor is not None and (
            tensor.dtype not in dtypes or (axes is not None and len(tensor.shape) != axes)
        ):
            expected = " or ".join(dtypes) + ("" if axes is None else f" with {axes} axes")
            raise PrecastError(
                f"{tensor.where}: expected {self.base}{ending} to be {expected}, found {tensor.dtype}"
                f" {list(tensor.shape)}; {REMEDY}."
            )
        return tensor

    def fail(self, what: str, remedy: str = REMEDY) -> PrecastError:
        """Return an error about this weight.

        Args:
            what: the fault, as "expected …, found …".
            remedy: the remedy, in the imperative.
        """
        return PrecastError(f"{self.base}: {what}; {remedy}.")
