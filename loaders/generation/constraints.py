"""The constraint of one answer, which determines the tokens that may come next.

llguidance parses the answer token by token. It computes the set of allowed next tokens in about 50 µs, and releases the
GIL while it does so. Another thread can therefore compute this set while the model computes the logits.
"""

from typing import TYPE_CHECKING

import numpy as np

from ..artifact.errors import PrecastError
from .stopping import DeadEnd

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from llguidance import LLMatcher


class Constraint:
    """The constraint of one answer. It is not thread-safe.

    Args:
        matcher: llguidance's parser, at the start of the answer.
        mask: the mask for the first token.
        name: the constraint's name in error texts.
        worker: a single-threaded executor that computes masks.
    """

    def __init__(
        self, matcher: "LLMatcher", mask: np.ndarray, *, name: str, worker: "ThreadPoolExecutor"
    ) -> None:
        self._matcher, self._mask, self._name, self._worker = matcher, mask, name, worker
        self._pending: Future[np.ndarray] | None = None
        self._accepted = 0

    @property
    def is_complete(self) -> bool:
        """True if the answer is complete, so that only an end token may follow."""
        self.mask()
        return bool(self._matcher.is_stopped())

    def mask(self) -> np.ndarray:
        """Return the allowed next tokens as a bit mask, uint32 [ceil(V / 32)], with the lowest id in the lowest bit.

        Raises:
            DeadEnd: no token may come next.
            PrecastError: the grammar is too ambiguous to follow further.
        """
        if self._pending is not None:
            self._mask, self._pending = self._pending.result(), None
        if self._matcher.is_error():
            raise self._error()
        return self._mask

    def accept(self, token_id: int) -> None:
        """Advance the parser by a token of the answer, and start to compute the next mask in the background.

        Raises:
            DeadEnd: the constraint forbids the token.
            PrecastError: the grammar is too ambiguous to follow further.
        """
        self.mask()
        if not self._matcher.consume_token(token_id):
            raise self._error()
        self._accepted += 1
        self._pending = self._worker.submit(compute_mask, self._matcher, self._mask.size)

    def _error(self) -> PrecastError:
        reason = self._matcher.get_error()
        where = f"{self._name}: after {self._accepted} tokens of the answer,"
        if "NoExtension" in reason or "doesn't satisfy the grammar" in reason:
            return DeadEnd(f"{where} no token of the model's vocabulary may follow; change the constraint.")
        return PrecastError(
            f"{where} the grammar is too ambiguous to follow ({first_line(reason)}); simplify the constraint."
        )


def compute_mask(matcher: "LLMatcher", words: int) -> np.ndarray:
    """Return the mask of the allowed next tokens, uint32 [words].

    If the computation fails, `matcher.is_error()` becomes True, and `matcher.get_error()` returns the message.
    """
    mask = np.zeros(words, np.uint32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    return mask


def first_line(message: str) -> str:
    """Return the first line of a message from llguidance, without a full stop, and at most 300 characters long."""
    return message.strip().partition("\n")[0].rstrip(". ")[:300]
