"""Traces of requests through OpenTelemetry, if its package is installed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# OpenTelemetry's names for facts about generations.
_NAMES = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
}


class Tracing:
    """A source of spans. The environment configures their export, as OpenTelemetry's documentation describes."""

    def __init__(self) -> None:
        try:
            from opentelemetry import propagate, trace
        except ImportError:
            self._tracer = None
            return
        self._extract, self._kind = propagate.extract, trace.SpanKind.SERVER
        self._tracer = trace.get_tracer("precast")

    @contextmanager
    def span(
        self, method: str, path: str, headers: Mapping[str, str], facts: Mapping[str, Any]
    ) -> Iterator[None]:
        """Record a request as a span, and continue the trace that the request's headers name.

        Args:
            method: the HTTP method.
            path: the path.
            headers: the headers.
            facts: facts about the request, which become attributes at its end.
        """
        if self._tracer is None:
            yield
            return
        with self._tracer.start_as_current_span(
            method, context=self._extract(headers), kind=self._kind
        ) as span:
            span.set_attributes({"http.request.method": method, "url.path": path})
            try:
                yield
            finally:
                span.set_attributes({_NAMES[key]: value for key, value in facts.items() if key in _NAMES})
