"""`precast batch`: a record for each request, in order, and runs that resume an interrupted one."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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
    assert errors[0]["message"].endswith("in.jsonl: line 3: expected a JSON object, found '\"no object\"'.")
    assert errors[1:] == [
        {
            "code": "invalid_request",
            "message": "Sampling parameters: temperature must be a finite number of at least 0, found -1.",
        },
        {
            "code": "invalid_request",
            "message": "prompt: expected text in UTF-8, found other bytes; convert the text first.",
        },
    ]


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


def test_a_request_is_answered_again_if_the_files_that_decide_its_answer_change() -> None:
    def identity(prefixes: tuple[Any, ...] = (), **changed: str) -> bytes:
        names = {"weights": "weights.safetensors", "tokenizer": "tokenizer.json", "template": "chat.jinja"}
        files = {path: SimpleNamespace(sha256=changed.get(name, "0")) for name, path in names.items()}
        files |= {prefix.arrays: SimpleNamespace(sha256="1") for prefix in prefixes}
        manifest = SimpleNamespace(name="m", files=files, prefixes=prefixes)
        return batch._identity(SimpleNamespace(manifest=manifest), batch._Defaults(PARAMS, {}))  # type: ignore[arg-type]

    changes = [{}, {"weights": "1"}, {"tokenizer": "1"}, {"template": "1"}]
    assert len({identity(**change) for change in changes}) == 4
    assert identity((SimpleNamespace(arrays="prefixes/p/cache.safetensors"),)) == identity()


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
    assert slots_model.scheduler.stats().running == 0  # all slots are free again
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
        ({"prompt": "a", "tools": []}, "request: expected messages with tools, found a prompt."),
        (
            {"prompt": "a", "chat_template_kwargs": {}},
            "request: expected messages with chat_template_kwargs, found a prompt.",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": [1]},
            "Chat: expected template variables to be an object, found list.",
        ),
    ],
)
def test_a_request_has_one_prompt(
    slots_model: Any, tmp_path: Path, request_: dict[str, Any], text: str
) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps(request_))  # no line feed at the end
    found = batch.run(slots_model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", PARAMS)
    assert found == BatchResult(kept=0, answers=0, errors=1)
    (record,) = records((tmp_path / "out.jsonl").read_bytes())
    assert record["error"] == {"code": "invalid_request", "message": text}


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
        {"prompt": "a", "messages": None, "custom_id": "a", "temperature": None},
    ]
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), source)

    def interrupt(step: Step) -> None:
        if step.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        batch.run(slots_model, source, target, PARAMS, progress=interrupt)
    assert not target.exists()
    assert batch.run(slots_model, source, target, PARAMS) == BatchResult(kept=1, answers=2, errors=2)
    found = parquet.read_table(target).to_pylist()
    assert [row["custom_id"] for row in found] == ["a", "b", "c", "a"]
    assert found[0]["text"] == slots_model.generate("the cat", PARAMS).text
    assert found[0]["completion_tokens"] == 4
    assert [row["error"] for row in found] == [
        None,
        None,
        {
            "code": "invalid_request",
            "message": "request: expected either prompt or messages, found neither.",
        },
        {
            "code": "duplicate_custom_id",
            "message": "request: custom_id must be unique in a file, found 'a' for a second time.",
        },
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "out.parquet"]
    with pytest.raises(PrecastError) as error:
        batch.run(slots_model, source, target, PARAMS)
    assert str(error.value) == f"{target}: exists already; remove it, or choose another output."


@pytest.mark.parametrize("field", ["stop", "choice", "bad_words_ids"])
def test_a_request_at_the_limit_of_nesting_has_an_error_record(
    slots_model: Any, tmp_path: Path, field: str
) -> None:
    """Some depths can be parsed, but exceed the recursion limit in the check of the field."""
    depths = range(850, 1001)
    lines = [f'{{"prompt": "a", "{field}": {"[" * depth}{"]" * depth}}}\n' for depth in depths]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    found = batch.run(slots_model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", PARAMS)
    assert found == BatchResult(kept=0, answers=0, errors=len(depths))


def test_parquet_takes_every_id(slots_model: Any, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = [{"prompt": "a", "custom_id": custom_id} for custom_id in (7, "7", "half \ud800")]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    target = tmp_path / "out.parquet"
    assert batch.run(slots_model, tmp_path / "in.jsonl", target, PARAMS).answers == 3
    assert parquet.read_table(target)["custom_id"].to_pylist() == ["7", "7", "half \\ud800"]


# --- many bad requests --------------------------------------------------------------------------------------

LONG = "the cat " * 400
# Bad requests of each kind, each with the code of the error and the beginning of its message.
BAD: list[tuple[bytes | dict[str, Any], str, str]] = [
    (
        b'{"prompt": "the cat"',
        "invalid_json_line",
        'SOURCE: line N: expected a JSON object, found \'{"prompt": ',
    ),
    (b"", "invalid_json_line", "SOURCE: line N: expected a JSON object, found ''."),
    (b"\xff\xfe{}", "invalid_json_line", "SOURCE: line N: expected a JSON object, found "),
    (
        b"[" * 100_000,
        "invalid_json_line",
        "SOURCE: line N: expected a JSON object, found JSON that is nested too deeply.",
    ),
    (
        {"prompt": "a", "top": 3},
        "invalid_request",
        "Sampling parameters: found the unknown parameter 'top'; use one of",
    ),
    ({"prompt": LONG}, "invalid_request", "prompt: "),
    ({"messages": [{"role": "user", "content": LONG}]}, "invalid_request", "prompt: "),
    (
        {"prompt": "a", "json_schema": {"if": {}}},
        "invalid_request",
        "json_schema: expected a schema that llguidance",
    ),
    (
        {"prompt": "a", "json_schema": "{"},
        "invalid_request",
        "Sampling parameters: json_schema is not valid JSON: ",
    ),
    (
        {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": 3}}},
        "invalid_request",
        "Sampling parameters: json_schema must be a JSON object",
    ),
    (
        {"prompt": "a", "response_format": 3},
        "invalid_request",
        "request: response_format must have the type text",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"function": 3}]},
        "invalid_request",
        "Chat: expected tools[0] to be a tool",
    ),
    (
        {"messages": []},
        "invalid_request",
        "Chat: expected a list of at least one message, found an empty list.",
    ),
    ({"messages": [{"role": "user"}]}, "invalid_request", "Chat: expected messages[0] to be a message"),
    ({"messages": "hello"}, "invalid_request", "Chat: expected a list of at least one message, found str."),
    ({"prompt": 3}, "invalid_request", "prompt: expected text or token ids, found int."),
    (
        {"prompt": ""},
        "invalid_request",
        "prompt: expected at least one token, found none; give the model some text.",
    ),
    ({"prompt": {"a": 1}}, "invalid_request", "prompt: expected token ids from 0 to"),
    ({"prompt": [[1]]}, "invalid_request", "prompt: expected token ids from 0 to"),
    ({"prompt": "a", "max_tokens": "3"}, "invalid_request", "Sampling parameters: max_tokens must be"),
    ({"prompt": "a", "stop": [3]}, "invalid_request", "Sampling parameters: stop must be"),
    (
        {"prompt": "a", "logit_bias": {"x": 1}},
        "invalid_request",
        "Sampling parameters: a token id of logit_bias",
    ),
    ({"body": [], "custom_id": "b"}, "invalid_request", "request: body must be an object, found []."),
    ({}, "invalid_request", "request: expected either prompt or messages, found neither."),
    (
        {"prompt": "a", "custom_id": ["x"]},
        "invalid_request",
        "request: custom_id must be a string or a whole number,",
    ),
    (
        {"prompt": "a", "custom_id": "id-0"},
        "duplicate_custom_id",
        "request: custom_id must be unique in a file,",
    ),
    (
        {"prompt": "a", "suppress_tokens": [*range(400)]},
        "generation_failed",
        "Sampling: suppress_tokens, bad_words_ids",
    ),
]


def requests_with_bad_ones(count: int) -> tuple[list[bytes], dict[int, int]]:
    """Return the lines of a batch, every eighth of them bad, and the kind of each bad one."""
    lines, bad = [], {}
    for n in range(count):
        request: Any = {
            "prompt": [5 + n % 9, 6, n % 100],
            "max_tokens": 1 + n % 3,
            "ignore_eos": True,
            "custom_id": f"id-{n}",
        }
        if n % 8 == 7:
            bad[n] = len(bad) % len(BAD)
            request = BAD[bad[n]][0]
        lines.append(request if isinstance(request, bytes) else json.dumps(request).encode())
    return lines, bad


def check_records(found: list[dict[str, Any]], lines: list[bytes], bad: dict[int, int], source: Path) -> None:
    assert len(found) == len(lines)
    for n, record in enumerate(found):
        if n not in bad:
            assert (record["custom_id"], record["completion_tokens"]) == (f"id-{n}", 1 + n % 3)
            assert "error" not in record
            continue
        _, code, text = BAD[bad[n]]
        assert list(record)[-2:] == ["key", "error"]
        assert list(record["error"]) == ["code", "message"]
        assert record["error"]["code"] == code
        text = text.replace("SOURCE", str(source)).replace("line N", f"line {n + 1}")
        assert record["error"]["message"].startswith(text)
        assert "\n" not in record["error"]["message"]


def test_two_hundred_requests_with_bad_ones_of_every_kind(
    cli: Callable[..., Any], slots_artifact: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llguidance")
    lines, bad = requests_with_bad_ones(len(BAD) * 8)
    assert (len(lines) >= 200, set(bad.values())) == (True, set(range(len(BAD))))
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(lines) + b"\n")
    result = cli("batch", slots_artifact, source, target)
    assert (result.exit_code, result.stdout) == (1, "")
    good = len(lines) - len(bad)
    assert result.stderr.endswith(f"{target}: {good} answers and {len(bad)} errors\n")
    data = target.read_bytes()
    check_records(records(data), lines, bad, source)
    # Ids are unique across runs too: a resumed run knows the ids of the existing records.
    target.write_bytes(b"".join(data.splitlines(keepends=True)[:50]))
    again = cli("batch", slots_artifact, source, target)
    assert again.stderr.endswith(
        f"{target}: {good} answers and {len(bad)} errors, 50 of them from an earlier run\n"
    )
    assert target.read_bytes() == data
    source.write_bytes(b"\n".join(line for n, line in enumerate(lines) if n not in bad))
    only_good = cli("batch", slots_artifact, source, tmp_path / "good.jsonl")
    assert (only_good.exit_code, len(records((tmp_path / "good.jsonl").read_bytes()))) == (0, good)


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
    assert same.stderr == f"error: {source}: is both the input and the output; choose another output.\n"
