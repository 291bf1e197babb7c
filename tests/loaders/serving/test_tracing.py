"""Traces of requests through OpenTelemetry, and without its package."""

import sys
from contextlib import contextmanager
from typing import Any

import pytest

from precast.loaders.serving.tracing import Tracing

trace = pytest.importorskip("opentelemetry.trace")


class Tracer:
    """A tracer that remembers its spans."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []

    @contextmanager
    def start_as_current_span(self, name: str, *, context: Any, kind: Any) -> Any:
        attributes: dict[str, Any] = {}
        parent = trace.get_current_span(context).get_span_context().trace_id
        self.spans.append({"name": name, "parent": parent, "kind": kind, "attributes": attributes})

        class Span:
            set_attributes = staticmethod(attributes.update)

        yield Span


def test_a_request_continues_the_trace_of_its_headers(monkeypatch) -> None:
    tracer = Tracer()
    monkeypatch.setattr(trace, "get_tracer", lambda name: tracer)
    facts: dict[str, Any] = {}
    headers = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    with Tracing().span("POST", "/v1/completions", headers, facts):
        facts.update(model="tiny", prompt_tokens=3, completion_tokens=4, finish_reasons=["stop"])
    (span,) = tracer.spans
    assert (span["name"], span["kind"]) == ("POST", trace.SpanKind.SERVER)
    assert f"{span['parent']:x}" == "af7651916cd43dd8448eb211c80319c"
    assert span["attributes"] == {
        "http.request.method": "POST",
        "url.path": "/v1/completions",
        "gen_ai.request.model": "tiny",
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ["stop"],
    }


def test_the_package_is_optional(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with Tracing().span("GET", "/health", {}, {}):
        pass
