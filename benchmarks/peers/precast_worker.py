"""precast, loaded as by `precast run`: an artifact and its engine, without jax."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from worker import timed_run


class Precast:
    packages = ("precast", "jaxlib", "numpy")

    def __init__(self, model: str, *, prefixes: bool = False) -> None:
        from precast.loaders.console.run import fast_start

        with fast_start(Path(model)):
            from precast.loaders.generation.engine import DecodeRow
            from precast.loaders.load import load

            self._model = load(model)
        self._folder, self._row, self._prefixes = Path(model), DecodeRow, prefixes
        self._engine = self._model.engine

    def prefill(self, ids: Sequence[int]) -> int:
        if self._prefixes:
            return self._generate(ids, 1).token_ids[0]
        self._cache = self._engine.new_cache()
        return int(self._engine.prefill(ids, self._cache).token[0])

    def step(self, token: int, position: int) -> int:
        return int(self._engine.decode([self._row(0, token, position)], self._cache).token[0])

    def run(self, ids: Sequence[int], steps: int) -> tuple[float, float, list[int]]:
        return timed_run(self, ids, steps)

    def _generate(self, ids: Sequence[int], tokens: int):
        from precast.loaders.generation.sampling_params import SamplingParams

        params = SamplingParams(max_tokens=tokens, ignore_eos=True, prompt_lookup=False)
        return self._model.generate(list(ids), params)

    def chat(self, turns: Sequence[Sequence[int]], answer: int) -> list[float]:
        times, ids = [], list[int]()
        for turn in turns:
            ids += turn
            completion = self._generate(ids, answer)
            times.append(completion.timing.queue_s + completion.timing.prefill_s)
            ids += completion.token_ids
        return times

    def together(self, conversations: Sequence, answer: int, temperature: float) -> dict:
        from precast.loaders.generation.sampling_params import SamplingParams

        prompts = [self._model.chat_prompt(each, literal=True) for each in conversations]
        params = SamplingParams(max_tokens=answer, ignore_eos=True, temperature=temperature, seed=1)
        started = time.perf_counter()
        done = self._model.generate_many(prompts, params)
        return {"seconds": time.perf_counter() - started, "texts": [each.text for each in done]}

    def logits(self, ids: Sequence[int], first: int) -> Iterator[object]:
        from precast.loaders.audit.evaluate import ArtifactScorer

        return ArtifactScorer(model=self._model).logits(ids, first)

    def weight_bytes(self) -> int:
        """Return the bytes of the weight file's tensors, except the RoPE tables, which no other engine stores."""
        from precast.loaders.artifact.weights import map_weights

        arrays = map_weights(self._folder / "weights.safetensors")
        return sum(array.nbytes for name, array in arrays.items() if not name.startswith("rope."))

    def windows(self, tokens: int, window: int) -> list[list[int]]:
        from precast.loaders.audit import evaluate

        text = evaluate.read_text(evaluate.SHIPPED_TEXT, tokens)
        cut = evaluate.cut(evaluate.tokenize(self._model.tokenizer, text), tokens, window)
        return [list(ids) for ids in cut]


def load(model: str, options: dict) -> Precast:
    return Precast(model, **options)
