"""OpenVINO GenAI: its pipeline measures times, and an infer request for the model computes logits."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from contenders import CAPACITY, THREADS


class OpenVino:
    packages = ("openvino", "openvino-genai", "openvino-tokenizers", "optimum-intel", "nncf")

    def __init__(
        self,
        model: str,
        *,
        backend: str = "PA",
        cache: str | None = None,
        prefixes: bool = False,
        pipeline: bool = True,
    ) -> None:
        self._path, self._request = model, None
        if not pipeline:  # for logits alone
            return
        properties = {"INFERENCE_NUM_THREADS": THREADS, "ATTENTION_BACKEND": backend}
        if cache is not None:
            properties["KV_CACHE_PRECISION"] = cache
        if backend == "PA":
            scheduler = genai.SchedulerConfig()
            # Unless `prefixes` is True, repeated prompts are computed again. Each prompt is one batch, instead of
            # chunks of 256 tokens.
            scheduler.enable_prefix_caching = prefixes
            scheduler.max_num_batched_tokens = CAPACITY
            properties["scheduler_config"] = scheduler
        self._pipeline = genai.LLMPipeline(model, "CPU", **properties)

    def _generate(self, ids: Sequence[int], tokens: int):
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        return self._pipeline.generate(ov.Tensor(np.array([ids], np.int64)), config)

    def prefill(self, ids: Sequence[int]) -> int:
        return int(self._generate(ids, 1).tokens[0][0])

    def run(self, ids: Sequence[int], steps: int) -> tuple[float, float, list[int]]:
        """Time the prompt with a call for one token, and the steps with the pipeline's time stamps."""
        started = time.perf_counter()
        self._generate(ids, 1)
        prefill = time.perf_counter() - started
        if not steps:
            return prefill, 0.0, []
        result = self._generate(ids, steps + 1)
        times = result.perf_metrics.raw_metrics.m_new_token_times
        if len(times) != steps + 1:
            raise RuntimeError(f"{len(times)} time stamps of {steps + 1} tokens")
        return prefill, (times[-1] - times[0]) / 1e3 / steps, [int(t) for t in result.tokens[0]]

    def chat(self, turns: Sequence[Sequence[int]], answer: int) -> list[float]:
        times, ids = [], list[int]()
        for turn in turns:
            ids += turn
            result = self._generate(ids, answer)
            times.append(result.perf_metrics.get_ttft().mean / 1e3)
            ids += [int(t) for t in result.tokens[0]]
        return times

    def logits(self, ids: Sequence[int], first: int) -> Iterator[object]:
        if self._request is None:
            model = ov.Core().compile_model(
                Path(self._path) / "openvino_model.xml", "CPU", {"INFERENCE_NUM_THREADS": THREADS}
            )
            self._request = model.create_infer_request()
        self._request.reset_state()
        yield self._infer(ids[: first + 1], 0)
        for position in range(first + 1, len(ids) - 1):
            yield self._infer([ids[position]], position)

    def _infer(self, ids: Sequence[int], start: int) -> np.ndarray:
        end = start + len(ids)
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return self._request.infer(inputs)["logits"][0, -1]

    def weight_bytes(self) -> int:
        return (Path(self._path) / "openvino_model.bin").stat().st_size


def load(model: str, options: dict) -> OpenVino:
    return OpenVino(model, **options)
