"""llama.cpp through llama-cpp-python: its loader, and then its C functions, the fastest way to run single tokens."""

import ctypes
from collections.abc import Iterator, Sequence

import llama_cpp as lib
import numpy as np
from contenders import CAPACITY, THREADS
from worker import timed_run


@lib.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    """Discard the library's log; the callback must live as long as the library."""


class LlamaCpp:
    """llama.cpp with flash attention, which saves 15 % of a prompt's time.

    llama.cpp enables it by default, but its Python package does not.
    """

    packages = ("llama-cpp-python", "numpy")

    def __init__(self, model: str, *, flash_attention: bool = True) -> None:
        lib.llama_log_set(_silent, ctypes.c_void_p(0))
        self._model = lib.Llama(
            model,
            n_ctx=CAPACITY,
            n_batch=CAPACITY,
            n_threads=THREADS,
            n_threads_batch=THREADS,
            flash_attn=flash_attention,
            verbose=False,
        )
        self._context = self._model.ctx
        self._vocab = self._model.n_vocab()

    def _decode(self, ids: Sequence[int]) -> np.ndarray:
        """Append tokens; return a view of the last one's logits ``[V]``."""
        tokens = (lib.llama_token * len(ids))(*ids)
        if lib.llama_decode(self._context, lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode failed on {len(ids)} tokens")
        return np.ctypeslib.as_array(lib.llama_get_logits(self._context), (self._vocab,))

    def _fresh(self, ids: Sequence[int]) -> np.ndarray:
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        return self._decode(ids)

    def prefill(self, ids: Sequence[int]) -> int:
        return int(self._fresh(ids).argmax())

    def step(self, token: int, position: int) -> int:
        return int(self._decode([token]).argmax())

    def run(self, ids: Sequence[int], steps: int) -> tuple[float, float, list[int]]:
        return timed_run(self, ids, steps)

    def logits(self, ids: Sequence[int], first: int) -> Iterator[object]:
        yield self._fresh(ids[: first + 1])
        for token in ids[first + 1 : -1]:
            yield self._decode([token])


def load(model: str, options: dict) -> LlamaCpp:
    return LlamaCpp(model, **options)
