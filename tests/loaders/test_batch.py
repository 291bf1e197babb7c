"""`precast batch`: a record for each request, in order, and runs that resume an interrupted one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from precast.loaders import batch
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.batch import BatchResult, request_fields
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.progress import Step

PARAMS = SamplingParams(max_tokens=4)
REQUESTS: list[Any] = [
    {"prompt": "the cat"},
    {"prompt": [5, 6, 7], "max_tokens": 9, "custom_id": "ids"},
    "no object",
    {"messages": [{"role": "user", "content": "hello"}], "temperature": 1.0, "seed": 3, "custom_id": 7},
    {"prompt": "the", "temperature": -1},
    {
        "custom_id": "openai",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "any", "messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 2},
    },
    {"prompt": "é\ud800", "custom_id": "half \ud800"},
    {"prompt": "the dog", "stop": "e", "max_tokens": 30},
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    return path


@pytest.fixture(scope="module")
def expected(slots_model: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the records of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "in.jsonl").write_text("".join(json.dumps(request) + "\n" for request in REQUESTS))
    found = batch.run(slots_model, folder / "in.jsonl", folder / "out.jsonl", PARAMS)
    assert found == BatchResult(kept=0, answers=5, errors=3)
    return (folder / "out.jsonl").read_bytes()


def records(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def test_each_request_has_a_record_in_order(slots_model: Any, expected: bytes) -> None:
    found = records(expected)
    assert [record.get("custom_id") for record in found] == [
        None,
        "ids",
        None,
        7,
        None,
        "openai",
        "half \ud800",
        None,
    ]
    assert found[0]["text"] == slots_model.generate("the cat", PARAMS).text
    assert (found[1]["prompt_tokens"], found[1]["completion_tokens"]) == (3, 9)
    chat = slots_model.chat(REQUESTS[3]["messages"], SamplingParams(max_tokens=4, temperature=1.0, seed=3))
    assert (found[3]["text"], found[3]["finish_reason"]) == (chat.text, chat.finish_reason)
    assert found[5]["completion_tokens"] == 2
    assert [list(record)[-1] for record in found].count("error") == 3


def test_the_error_of_a_request_is_one_sentence(expected: bytes) -> None:
    errors = [record["error"] for record in records(expected) if "error" in record]
    assert errors[0].endswith("in.jsonl: line 3: expected a JSON object, found '\"no object\"'.")
    assert errors[1] == ("Sampling parameters: temperature must be a finite number of at least 0, found -1.")
    assert errors[2] == "prompt: expected text in UTF-8, found other bytes; convert the text first."


def test_a_run_goes_on_wherever_another_one_ended(
    slots_model: Any, source: Path, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_identity", lambda model, params: b"same")
    whole = tmp_path / "whole.jsonl"
    batch.run(slots_model, source, whole, PARAMS)
    data = whole.read_bytes()
    target = tmp_path / "out.jsonl"
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    for cut in (0, 1, ends[0] - 1, ends[0], ends[2] + 5, ends[-2], ends[-1] - 1, ends[-1]):
        target.write_bytes(data[:cut])
        found = batch.run(slots_model, source, target, PARAMS)
        assert target.read_bytes() == data, cut
        assert found.kept == sum(end <= cut for end in ends)
        assert (found.answers, found.errors) == (5, 3)


@pytest.mark.parametrize("window", [1, 3, 8])
def test_order_is_independent_of_the_window(
    slots_model: Any,
    source: Path,
    tmp_path: Path,
    expected: bytes,
    window: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch, "_WINDOW", window)
    batch.run(slots_model, source, tmp_path / "out.jsonl", PARAMS)
    found = records((tmp_path / "out.jsonl").read_bytes())
    names = ("custom_id", "text", "finish_reason")
    assert [[record.get(name) for name in names] for record in found] == [
        [record.get(name) for name in names] for record in records(expected)
    ]


def test_an_interrupt_leaves_whole_records(slots_model: Any, source: Path, tmp_path: Path) -> None:
    steps: list[Step] = []

    def interrupt(step: Step) -> None:
        steps.append(step)
        if step.done == 2:
            raise KeyboardInterrupt

    target = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        batch.run(slots_model, source, target, PARAMS, progress=interrupt)
    assert [(step.done, step.total) for step in steps] == [(0, 8), (1, 8), (2, 8)]
    assert len(records(target.read_bytes())) == 2
    assert slots_model.scheduler.stats().running == 0  # slots are free again
    assert batch.run(slots_model, source, target, PARAMS).kept == 2
    assert len(records(target.read_bytes())) == 8


def test_records_of_other_requests_models_or_options_are_refused(
    slots_model: Any, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    batch.run(slots_model, source, target, PARAMS)
    data = target.read_bytes()

    def refused(number: int) -> None:
        with pytest.raises(PrecastError) as error:
            batch.run(slots_model, source, target, PARAMS)
        assert str(error.value) == (
            f"{target}: line {number} is not the record of line {number} of {source} with this model and these"
            " options; choose another output, or remove this one."
        )

    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join([lines[0], lines[3], *lines[2:]]))
    refused(2)
    source.write_text("".join(lines[:5]))
    refused(6)
    source.write_text("".join(lines))
    target.write_bytes(b"garbage\n" + data)
    refused(1)
    target.write_bytes(data)
    with pytest.raises(PrecastError, match="these options"):
        batch.run(slots_model, source, target, SamplingParams(max_tokens=5))


def test_files_that_cannot_be_opened_are_named(slots_model: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(PrecastError) as error:
        batch.run(slots_model, tmp_path / "none.jsonl", tmp_path / "out.jsonl", PARAMS)
    assert str(error.value) == (
        f"{tmp_path}/none.jsonl: cannot be read (No such file or directory); check the path."
    )
    with pytest.raises(PrecastError) as error:
        batch.run(slots_model, source, tmp_path / "none" / "out.jsonl", PARAMS)
    assert str(error.value) == (
        f"{tmp_path}/none/out.jsonl: cannot be written (No such file or directory); choose another output."
    )


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        ({"prompt": "a", "stop": "x", "custom_id": 1}, {"prompt": "a", "stop": ("x",)}),
        ({"body": {"prompt": "a", "n": 1, "stream": False}, "custom_id": 1}, {"prompt": "a"}),
        ({"prompt": "a", "temperature": None, "user": "me"}, {"prompt": "a"}),
        (
            {"prompt": "a", "response_format": {"type": "json_object"}},
            {"prompt": "a", "json_schema": {"type": "object"}},
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}}}},
            {"json_schema": {"a": 1}},
        ),
        ({"response_format": {"type": "text"}}, {}),
    ],
)
def test_names_of_openai_are_understood(request_: dict[str, Any], fields: dict[str, Any]) -> None:
    assert request_fields(request_) == fields


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({"n": 2}, "request: n must be 1, found 2."),
        ({"stream": True}, "request: stream must be false, found True."),
        ({"body": 3}, "request: body must be an object, found 3."),
        (
            {"response_format": {"type": "xml"}},
            "request: response_format must have the type text, json_object or json_schema, found {'type': 'xml'}.",
        ),
    ],
)
def test_requests_that_a_batch_cannot_answer_are_refused(request_: dict[str, Any], text: str) -> None:
    with pytest.raises(PrecastError) as error:
        request_fields(request_)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        ({}, "request: expected either prompt or messages, found neither."),
        (
            {"prompt": "a", "messages": []},
            "request: expected either prompt or messages, found both.",
        ),
        ({"prompt": "a", "tools": []}, "request: tools need messages, found a prompt."),
    ],
)
def test_a_request_has_one_prompt(
    slots_model: Any, tmp_path: Path, request_: dict[str, Any], text: str
) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(request_))  # no line feed at the end
    found = batch.run(slots_model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", PARAMS)
    assert found == BatchResult(kept=0, answers=0, errors=1)
    assert records((tmp_path / "out.jsonl").read_bytes())[0]["error"] == text


def test_parquet_in_and_out(slots_model: Any, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"prompt": "the cat", "messages": None, "custom_id": "a", "temperature": None},
        {
            "prompt": None,
            "messages": [{"role": "user", "content": "hi"}],
            "custom_id": "b",
            "temperature": 0.0,
        },
        {"prompt": None, "messages": None, "custom_id": "c", "temperature": None},
    ]
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), source)

    def interrupt(step: Step) -> None:
        if step.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch.run(slots_model, source, target, PARAMS, progress=interrupt)
    assert not target.exists()
    assert batch.run(slots_model, source, target, PARAMS) == BatchResult(kept=1, answers=2, errors=1)
    found = parquet.read_table(target).to_pylist()
    assert [row["custom_id"] for row in found] == ["a", "b", "c"]
    assert found[0]["text"] == slots_model.generate("the cat", PARAMS).text
    assert found[0]["completion_tokens"] == 4
    assert found[2]["error"] == "request: expected either prompt or messages, found neither."
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out.parquet"]
    with pytest.raises(PrecastError) as error:
        batch.run(slots_model, source, target, PARAMS)
    assert str(error.value) == f"{target}: exists already; remove it, or choose another output."


def test_the_command_answers_a_file(
    cli: Callable[..., Any], slots_artifact: Path, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    result = cli("batch", slots_artifact, source, target, "-n", 4)
    assert result.exit_code == 1
    assert f"{target}: 5 answers and 3 errors\n" in result.stderr
    again = cli("batch", slots_artifact, source, target, "-n", 4)
    assert f"{target}: 5 answers and 3 errors, 8 of them from an earlier run\n" in again.stderr
    same = cli("batch", slots_artifact, source, source)
    assert same.stderr == f"error: {source}: is the input as well as the output; choose another output.\n"
