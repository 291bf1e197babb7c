"""The families of metrics, with the names of vLLM's metrics under the prefix ``precast:``."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..generation.scheduler import SchedulerStats
from .pool import Pool

if TYPE_CHECKING:
    from ..generation.stream import Completion

_PREFIX = "precast:"
_LABEL = "model_name"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
_STATE: Mapping[str, tuple[Any, str, Callable[[SchedulerStats], int]]] = {
    "num_requests_running": (GaugeMetricFamily, "Answers that hold a slot.", lambda s: s.running),
    "num_requests_waiting": (GaugeMetricFamily, "Answers that wait for a slot.", lambda s: s.waiting),
    "prompt_tokens": (
        CounterMetricFamily,
        "Tokens of prompts, including cached ones.",
        lambda s: s.prompt_tokens + s.cached_tokens,
    ),
    "generation_tokens": (CounterMetricFamily, "Generated tokens.", lambda s: s.tokens),
    "prefix_cache_queries": (
        CounterMetricFamily,
        "Tokens of prompts that were looked up in the cache.",
        lambda s: s.prompt_tokens + s.cached_tokens,
    ),
    "prefix_cache_hits": (
        CounterMetricFamily,
        "Tokens of prompts whose keys and values were reused.",
        lambda s: s.cached_tokens,
    ),
}
_REASONS = {"unfinished": "abort"}


class Families:
    """The families of metrics of a server.

    Args:
        pool: the models.
    """

    def __init__(self, pool: Pool) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_State(pool))

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Any:
            return Histogram(_PREFIX + name, text, [_LABEL], registry=self._registry, buckets=buckets)

        self._success = Counter(
            f"{_PREFIX}request_success",
            "Answers that ended, by the reason for their end.",
            [_LABEL, "finished_reason"],
            registry=self._registry,
        )
        self._first = histogram(
            "time_to_first_token_seconds", "Time from submission to the first token.", _SECONDS
        )
        self._step = histogram(
            "request_time_per_output_token_seconds",
            "Mean time between two tokens of an answer.",
            _STEP_SECONDS,
        )
        self._all = histogram(
            "e2e_request_latency_seconds", "Time from submission to the last token.", _SECONDS
        )
        self._queue = histogram("request_queue_time_seconds", "Time from submission to the start.", _SECONDS)
        self._prefill = histogram(
            "request_prefill_time_seconds", "Time from the start to the first token.", _SECONDS
        )
        self._decode = histogram(
            "request_decode_time_seconds", "Time from the first to the last token.", _SECONDS
        )
        self._prompt = histogram("request_prompt_tokens", "Tokens of the prompt.", _TOKENS)
        self._generation = histogram("request_generation_tokens", "Tokens of the answer.", _TOKENS)

    def observe(self, model: str, done: "Iterable[Completion]") -> None:
        """Record answers that have ended."""
        for completion in done:
            timing, tokens = completion.timing, len(completion.token_ids)
            reason = _REASONS.get(completion.finish_reason, completion.finish_reason)
            self._success.labels(model, reason).inc()
            self._prompt.labels(model).observe(len(completion.prompt_token_ids))
            self._generation.labels(model).observe(tokens)
            if not tokens:
                continue
            self._queue.labels(model).observe(timing.queue_s)
            self._prefill.labels(model).observe(timing.prefill_s)
            self._decode.labels(model).observe(timing.decode_s)
            self._first.labels(model).observe(timing.queue_s + timing.prefill_s)
            self._all.labels(model).observe(timing.queue_s + timing.prefill_s + timing.decode_s)
            if tokens > 1:
                self._step.labels(model).observe(timing.decode_s / (tokens - 1))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return bytes(generate_latest(self._registry))


class _State(Collector):
    """A collector that reads the schedulers at each request for metrics. A reloaded model's counts start at 0 again."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        stats = {
            e.name: e.model.scheduler.stats() for e in self._pool.entries.values() if e.model is not None
        }
        for name, (kind, text, value) in _STATE.items():
            yield _family(kind, name, text, {model: value(each) for model, each in stats.items()})
        loaded = {entry.name: int(entry.model is not None) for entry in self._pool.entries.values()}
        yield _family(GaugeMetricFamily, "model_loaded", "1 if the model is in memory.", loaded)


def _family(kind: Any, name: str, text: str, values: "dict[str, int]") -> Any:
    family = kind(_PREFIX + name, text, labels=[_LABEL])
    for model, value in values.items():
        family.add_metric([model], value)
    return family
