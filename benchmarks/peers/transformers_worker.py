"""transformers with torch in float32, run by a loop that has less overhead than `generate`."""

from collections.abc import Iterator, Sequence

import torch
from contenders import THREADS
from worker import timed_run


class Transformers:
    packages = ("transformers", "torch")

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(THREADS)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._cache = None

    @torch.inference_mode()
    def _forward(self, ids: Sequence[int]):
        out = self._model(
            input_ids=torch.tensor([ids]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = out.past_key_values
        return out.logits[0, -1].numpy()

    def prefill(self, ids: Sequence[int]) -> int:
        self._cache = None
        return int(self._forward(ids).argmax())

    def step(self, token: int, position: int) -> int:
        return int(self._forward([token]).argmax())

    def run(self, ids: Sequence[int], steps: int) -> tuple[float, float, list[int]]:
        return timed_run(self, ids, steps)

    def logits(self, ids: Sequence[int], first: int) -> Iterator[object]:
        self._cache = None
        yield self._forward(ids[: first + 1])
        for token in ids[first + 1 : -1]:
            yield self._forward([token])


def load(model: str, options: dict) -> Transformers:
    return Transformers(model, **options)
