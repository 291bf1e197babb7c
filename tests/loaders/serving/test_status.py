"""Health, metrics, descriptions, logs, and the tokens of texts."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from precast.loaders.serving.description import openapi, page
from precast.loaders.serving.routes import ROUTES

TEXT = {"model": "tiny", "prompt": "the cat", "max_tokens": 4}


def test_metrics_have_vllms_names(tiny_server) -> None:
    def values() -> dict[str, float]:
        text = tiny_server.request("/metrics")[2]
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    before = values()
    assert tiny_server.request("/v1/completions", TEXT)[0] == 200
    after, label = values(), '{model_name="tiny"}'
    for name, more in (("generation_tokens_total", 4), ("request_generation_tokens_sum", 4)):
        assert after[f"precast:{name}{label}"] - before.get(f"precast:{name}{label}", 0) == more
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert after[f"precast:{name}_count{label}"] > before.get(f"precast:{name}_count{label}", 0)
    ended = 'precast:request_success_total{finished_reason="length",model_name="tiny"}'
    assert after[ended] - before.get(ended, 0) == 1
    assert after[f"precast:num_requests_running{label}"] == 0
    assert after[f"precast:prefix_cache_queries_total{label}"] > 0


def test_answers_before_the_import_of_the_metrics_count() -> None:
    """The import takes 60 ms, so an answer must not wait for it."""
    found = run_python(
        "import asyncio, sys\n"
        "from types import SimpleNamespace as Some\n"
        "from precast.loaders.generation.stream import Timing\n"
        "from precast.loaders.serving.metrics import Metrics\n"
        "timing = Timing(prefill_s=1.0, decode_s=1.0, decode_tokens_per_s=1.0)\n"
        "answer = Some(finish_reason='stop', prompt_token_ids=(1,), token_ids=(1, 2), timing=timing)\n"
        "metrics = Metrics(Some(entries={}))\n"
        "metrics.observe('m', [answer])\n"
        "assert 'prometheus_client' not in sys.modules\n"
        "texts = [asyncio.run(metrics.text()).decode() for _ in range(2)]\n"
        "metrics.observe('m', [answer])\n"
        "texts.append(asyncio.run(metrics.text()).decode())\n"
        'label = \'{finished_reason="stop",model_name="m"}\'\n'
        "counts = [text.split(f'request_success_total{label} ')[1].split()[0] for text in texts]\n"
        "print(*counts)\n"
    )
    assert found.split() == ["1.0", "1.0", "2.0"]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_probes_may_ask_for_the_head_alone(tiny_server) -> None:
    assert tiny_server.request("/health", method="HEAD")[0] == 200


def test_a_request_is_logged(tiny_server) -> None:
    name = "logged-1"
    tiny_server.request("/v1/completions", TEXT, headers={"x-request-id": name})
    (record,) = tiny_server.wait_for(lambda: tiny_server.records(request_id=name))
    assert (record["event"], record["method"], record["path"]) == ("request", "POST", "/v1/completions")
    assert (record["status"], record["model"], record["completion_tokens"]) == (200, "tiny", 4)
    assert record["duration_ms"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"])


def test_openapi_describes_every_route(tiny_server) -> None:
    status, _, described = tiny_server.request("/openapi.json")
    assert (status, described["openapi"]) == (200, "3.1.0")
    assert {(path, method) for path, methods in described["paths"].items() for method in methods} == {
        (route.path, route.method.lower()) for route in ROUTES
    }
    references = re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(described))
    assert set(references) <= described["components"]["schemas"].keys()
    for schema in described["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_bodies_fit_the_described_schemas() -> None:
    described = openapi(ROUTES)

    def check(path: str, body: dict[str, Any]) -> bool:
        schema = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        return bool(Draft202012Validator({**schema, "components": described["components"]}).is_valid(body))

    assert check("/v1/completions", TEXT)
    assert not check("/v1/completions", TEXT | {"foo": 1})
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
    assert check("/v1/chat/completions", chat)
    assert check("/v1/messages", chat | {"max_tokens": 1})
    assert not check("/v1/messages", chat)


def test_the_page_loads_nothing_from_elsewhere(tiny_server) -> None:
    status, headers, text = tiny_server.request("/docs")
    assert status == 200
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert text == page(ROUTES)
    assert "//" not in re.sub(r"<!--.*?-->", "", text)
    assert "<code>frequency_penalty</code></td><td>number from -2 to 2</td>" in text


def test_tokens_of_a_text_and_back(tiny_server, tiny_model) -> None:
    status, _, found = tiny_server.request("/tokenize", {"model": "tiny", "prompt": "the cat"})
    tokens = tiny_model.tokenizer.encode("the cat")
    assert (status, found) == (200, {"tokens": tokens, "count": len(tokens), "max_model_len": 64})
    back = tiny_server.request("/detokenize", {"model": "tiny", "tokens": tokens})[2]
    assert back == {"prompt": "the cat"}
    named = tiny_server.request("/tokenize", {"model": "tiny", "prompt": "the", "return_token_strs": True})[2]
    assert "".join(named["token_strs"]) == "the"


def test_tokens_of_a_chat(tiny_server) -> None:
    messages = [{"role": "user", "content": "<|im_end|>"}]
    found = tiny_server.request("/tokenize", {"model": "tiny", "messages": messages})[2]
    body = {"model": "tiny", "messages": messages, "max_tokens": 1}
    usage = tiny_server.request("/v1/chat/completions", body)[2]["usage"]
    assert found["count"] == usage["prompt_tokens"]
    text = tiny_server.request("/detokenize", {"model": "tiny", "tokens": found["tokens"]})[2]["prompt"]
    assert text == "<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert found["tokens"].count(3) == 1  # the user's text is plain


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [2**40]}),
        ("/detokenize", {"tokens": ["a"]}),
    ],
)
def test_unusable_texts(tiny_server, path, change) -> None:
    status, _, body = tiny_server.request(path, {"model": "tiny", **change})
    assert status == 400
    assert body["error"]["type"] == "invalid_request_error"
