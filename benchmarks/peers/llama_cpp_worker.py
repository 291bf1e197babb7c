"""llama.cpp: llama-cpp-python loads the model, then llama.cpp's C functions run it, because they are fastest."""

import ctypes
import time
from collections.abc import Iterator, Sequence

import llama_cpp as lib
import numpy as np
from contenders import CAPACITY, THREADS
from worker import timed_run


@lib.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    """Discard the library's log. The callback is global, because it must live as long as the library."""


class LlamaCpp:
    """llama.cpp with flash attention, which shortens the time of a prompt by 15%.

    llama.cpp enables flash attention by default, but its Python package does not.
    """

    packages = ("llama-cpp-python", "numpy")

    def __init__(
        self, model: str, *, flash_attention: bool = True, state: str | None = None, threads: int = THREADS
    ) -> None:
        self._state = state
        lib.llama_log_set(_silent, ctypes.c_void_p(0))
        self._model = lib.Llama(
            model,
            n_ctx=CAPACITY,
            n_batch=CAPACITY,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=flash_attention,
            verbose=False,
        )
        self._context = self._model.ctx
        self._vocab = self._model.n_vocab()

    def _decode(self, ids: Sequence[int]) -> np.ndarray:
        """Append tokens to the cache; return a view of the last token's logits ``[V]``."""
        tokens = (lib.llama_token * len(ids))(*ids)
        if lib.llama_decode(self._context, lib.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode failed on {len(ids)} tokens")
        return np.ctypeslib.as_array(lib.llama_get_logits(self._context), (self._vocab,))

    def _fresh(self, ids: Sequence[int]) -> np.ndarray:
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        return self._decode(ids)

    def prefill(self, ids: Sequence[int]) -> int:
        if self._state is None:
            return int(self._fresh(ids).argmax())
        return int(self._decode(ids[self._restore(self._state) :]).argmax())

    def _restore(self, path: str) -> int:
        """Load a state into the empty cache; return its number of tokens."""
        tokens, count = (lib.llama_token * CAPACITY)(), ctypes.c_size_t()
        if not lib.llama_state_seq_load_file(
            self._context, path.encode(), 0, tokens, CAPACITY, ctypes.byref(count)
        ):
            raise RuntimeError(f"llama.cpp could not load the state {path}")
        return count.value

    def store(self, ids: Sequence[int], path: str) -> None:
        self._fresh(ids)
        tokens = (lib.llama_token * len(ids))(*ids)
        if not lib.llama_state_seq_save_file(self._context, path.encode(), 0, tokens, len(ids)):
            raise RuntimeError(f"llama.cpp could not save the state {path}")

    def chat(self, turns: Sequence[Sequence[int]], answer: int) -> list[float]:
        times, unread = [], list[int]()
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        for turn in turns:
            started = time.perf_counter()
            token = int(self._decode([*unread, *turn]).argmax())
            times.append(time.perf_counter() - started)
            for _ in range(answer - 1):
                token = int(self._decode([token]).argmax())
            unread = [token]
        return times

    def step(self, token: int, position: int) -> int:
        return int(self._decode([token]).argmax())

    def run(self, ids: Sequence[int], steps: int) -> tuple[float, float, list[int]]:
        return timed_run(self, ids, steps)

    def logits(self, ids: Sequence[int], first: int) -> Iterator[object]:
        yield self._fresh(ids[: first + 1])
        for token in ids[first + 1 : -1]:
            yield self._decode([token])

    def weight_bytes(self) -> int:
        return lib.llama_model_size(self._model.model)


def load(model: str, options: dict) -> LlamaCpp:
    return LlamaCpp(model, **options)
