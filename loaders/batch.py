"""Answer every request of a file, several at a time, and write the records to another file in the same order.

A request is a JSON object, or a row of a Parquet file::

    {"prompt": "text, or token ids", "max_tokens": 20}
    {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0.7, "custom_id": "1"}
    {"custom_id": "2", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}

A request may also contain sampling parameters by name. A request with messages may contain `tools`, and variables of
the chat template in `chat_template_kwargs`. Some of OpenAI's fields are also supported: `max_completion_tokens`,
`response_format`, `tool_choice`, and a single string for `stop`. A record of the output has one of two forms::

    {"custom_id": "1", "key": "5f0…", "text": "Hi", "finish_reason": "stop", "prompt_tokens": 9, "completion_tokens": 2}
    {"custom_id": "1", "key": "5f0…", "error": {"code": "invalid_request", "message": "one sentence"}}

The record of an answer also contains `reasoning`, `tool_calls` and `logprobs` if there are any. An error has the form
of OpenAI's batch API. A refused request has the code `invalid_json_line`, `duplicate_custom_id` or `invalid_request`. A
request that fails during generation has the code `generation_failed`.

`key` identifies the request, the model and the options. A later run with the same requests, model and options keeps the
existing records and continues after the last one. It drops an incomplete last record, which an interrupt may leave
behind.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from .artifact.errors import PrecastError
from .generation.chats import AUTO
from .generation.sampling_params import SamplingParams
from .progress import Progress, Step, silent
from .text.tool_grammar import REQUIRED

if TYPE_CHECKING:
    from .generation.model import Model
    from .generation.stream import Completion, Stream

# The number of requests in a window. The records are put into order in memory, one window at a time, so a larger window
# needs more memory. Some slots are idle at the end of each window.
_WINDOW = 1024
_PARQUET = ".parquet"
# The endings of the names of the files that determine an artifact's answers.
_DECIDING = (".safetensors", "tokenizer.json", ".jinja")
_INVALID, _TOO_DEEP = "invalid_request", "JSON that is nested too deeply"
# OpenAI's fields that do not change the answer, and the supported values of OpenAI's fields that would change it.
_IGNORED = frozenset({"model", "user", "metadata", "store"})
_SUPPORTED: Mapping[str, tuple[object, ...]] = {"n": (1, None), "stream": (False, None)}


class BatchResult(NamedTuple):
    """The numbers of records in the output: records of an earlier run, all answers, and all errors."""

    kept: int
    answers: int
    errors: int


class _Failure(NamedTuple):
    """The error of a request: the code for its record, and a message of one sentence."""

    code: str
    message: str


class _Request(NamedTuple):
    """A request: its key, its `custom_id` or None, and either its fields or the error that makes it unusable."""

    key: str
    custom_id: str | int | None
    fields: Mapping[str, Any] | _Failure


class _Defaults(NamedTuple):
    """The sampling parameters and the variables of the chat template that the fields of a request override."""

    params: SamplingParams
    variables: Mapping[str, Any]


def run(
    model: "Model",
    source: Path,
    target: Path,
    params: SamplingParams,
    *,
    template_variables: Mapping[str, Any] = MappingProxyType({}),
    progress: Progress = silent,
) -> BatchResult:
    """Answer every request of a file.

    The record of a failed request contains the error. After an exception or an interrupt, the output contains the
    records that were complete by then.

    Args:
        model: the model.
        source: the file of requests: JSON lines in UTF-8, or a Parquet file if the name ends in .parquet.
        target: the file of records: JSON lines, or a Parquet file if the name ends in .parquet. A Parquet file is
            written at the end; until then, the records are in a file with `.partial.jsonl` appended to the name.
        params: default sampling parameters, which the fields of a request override.
        template_variables: default variables of the chat template, which those of a request override.
        progress: receives the number of records written.

    Raises:
        PrecastError: a file cannot be read or written, the output contains records of other requests, or the extra
            `parquet` is needed and not installed.
    """
    is_parquet = target.suffix == _PARQUET
    if is_parquet and target.exists():
        raise PrecastError(f"{target}: exists already; remove it, or choose another output.")
    records = target.with_name(target.name + ".partial.jsonl") if is_parquet else target
    defaults = _Defaults(params, template_variables)
    identity = _identity(model, defaults)
    total = _count(source)
    with _opened(records) as file:
        requests = _requests(source, identity)
        counts = _keep_records(file, requests, records, source)
        kept = sum(counts)
        progress(_step(kept, total))
        for record in _answers(model, requests, defaults):
            counts["error" in record] += 1
            # JSON may contain a lone surrogate, which UTF-8 cannot encode. The error handler writes it as a JSON
            # escape.
            file.write(f"{json.dumps(record, ensure_ascii=False)}\n".encode(errors="backslashreplace"))
            file.flush()
            progress(_step(sum(counts), total))
    if is_parquet:
        _write_parquet(records, target)
        records.unlink()
    return BatchResult(kept, *counts)


def _identity(model: "Model", defaults: _Defaults) -> bytes:
    """Return the bytes that identify the model and the defaults in each request's key.

    They cover the model's name, weights, tokenizer and chat templates. Stored prefixes are left out, because they do
    not change answers.
    """
    manifest = model.manifest
    stored = {prefix.arrays for prefix in manifest.prefixes}
    files = {
        name: entry.sha256
        for name, entry in manifest.files.items()
        if name.endswith(_DECIDING) and name not in stored
    }
    variables = [json.dumps(defaults.variables, sort_keys=True)] if defaults.variables else []
    return repr((manifest.name, sorted(files.items()), defaults.params, *variables)).encode()


def _step(done: int, total: int) -> Step:
    return Step(text="answering", done=done, total=total, unit="requests")


# --- requests -----------------------------------------------------------------------------------------------


def _count(source: Path) -> int:
    """Return the number of lines or rows in a file of requests."""
    if source.suffix == _PARQUET:
        return int(_parquet(source).metadata.num_rows)
    with _reading(source) as file:
        return sum(1 for _ in file)


def _requests(source: Path, identity: bytes) -> Iterator[_Request]:
    """Yield the requests of a file. An invalid or repeated `custom_id` makes a request unusable."""
    seen: set[str | int] = set()
    for key, fields in _lines(source, identity):
        custom_id = None if isinstance(fields, _Failure) else fields.get("custom_id")
        if custom_id is None:
            yield _Request(key, None, fields)
        elif not isinstance(custom_id, str | int) or isinstance(custom_id, bool):
            text = f"request: custom_id must be a string or a whole number, found {custom_id!r:.60}."
            yield _Request(key, None, _Failure(_INVALID, text))
        elif custom_id in seen:
            text = f"request: custom_id must be unique in a file, found {custom_id!r:.60} for a second time."
            yield _Request(key, custom_id, _Failure("duplicate_custom_id", text))
        else:
            seen.add(custom_id)
            yield _Request(key, custom_id, fields)


def _lines(source: Path, identity: bytes) -> Iterator[tuple[str, Mapping[str, Any] | _Failure]]:
    """Yield the key of each request in a file, and either its fields or, for a line that cannot be parsed, an error."""
    if source.suffix == _PARQUET:
        for batch in _parquet(source).iter_batches(batch_size=_WINDOW):
            for row in batch.to_pylist():
                given = {name: value for name, value in row.items() if value is not None}
                yield _key(identity, repr(given).encode()), given
        return
    with _reading(source) as file:
        for number, line in enumerate(file, 1):
            yield _key(identity, line.rstrip(b"\r\n")), _parsed(line, f"{source}: line {number}")


def _reading(source: Path) -> IO[bytes]:
    try:
        return source.open("rb")
    except OSError as error:
        raise PrecastError(f"{source}: cannot be read ({error.strerror}); check the path.") from None


def _key(identity: bytes, request: bytes) -> str:
    return hashlib.sha256(identity + b"\0" + request).hexdigest()[:16]


def _parsed(line: bytes, where: str) -> dict[str, Any] | _Failure:
    try:
        value = json.loads(line)
    except RecursionError:
        found = _TOO_DEEP
    except ValueError:
        found = _shortened(line)
    else:
        if isinstance(value, dict):
            return value
        found = _shortened(line)
    return _Failure("invalid_json_line", f"{where}: expected a JSON object, found {found}.")


def _shortened(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


# --- records of an earlier run ------------------------------------------------------------------------------


def _opened(records: Path) -> IO[bytes]:
    try:
        records.touch()
        return records.open("r+b")
    except OSError as error:
        raise PrecastError(
            f"{records}: cannot be written ({error.strerror}); choose another output."
        ) from None


def _keep_records(file: IO[bytes], requests: Iterator[_Request], records: Path, source: Path) -> list[int]:
    """Skip the records of an earlier run and the requests that they answer; drop an incomplete last record.

    Returns:
        The numbers of answers and of errors among the records of the earlier run.

    Raises:
        PrecastError: a record belongs to another request.
    """
    counts, end = [0, 0], 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        record, request = _parsed(line, f"{records}: line {number}"), next(requests, None)
        if isinstance(record, _Failure) or request is None or record.get("key") != request.key:
            raise PrecastError(
                f"{records}: line {number} is not the record of line {number} of {source} with this model and these"
                " options; choose another output, or remove this one."
            )
        counts["error" in record] += 1
        end += len(line)
    file.seek(end)
    file.truncate()
    return counts


# --- answers ------------------------------------------------------------------------------------------------


def _answers(model: "Model", requests: Iterator[_Request], defaults: _Defaults) -> Iterator[dict[str, Any]]:
    """Yield the record of each request, in the order of the requests."""
    while window := list(islice(requests, _WINDOW)):
        done: dict[int, dict[str, Any]] = {}
        place = 0
        for index, result in _results(model, window, defaults):
            done[index] = _record(window[index], result)
            while place in done:
                yield done.pop(place)
                place += 1


def _results(
    model: "Model", window: Sequence[_Request], defaults: _Defaults
) -> "Iterator[tuple[int, Completion | _Failure]]":
    """Run as many requests at a time as the model has slots; yield each request's index and result on completion."""
    waiting = iter(enumerate(window))
    running: dict[int, tuple[Stream, Iterator[object]]] = {}
    try:
        while True:
            while len(running) < model.engine.slots and (following := next(waiting, None)) is not None:
                index, request = following
                started = _start(model, request, defaults)
                if isinstance(started, _Failure):
                    yield index, started
                else:
                    running[index] = started, started.events()
            if not running:
                return
            for index, (stream, events) in list(running.items()):
                try:
                    if next(events, None) is not None:
                        continue
                    result: Completion | _Failure = stream.completion
                except PrecastError as error:
                    result = _Failure("generation_failed", str(error))
                del running[index]
                yield index, result
    finally:
        for stream, _ in running.values():
            stream.close()


def _start(model: "Model", request: _Request, defaults: _Defaults) -> "Stream | _Failure":
    """Start the generation of a request; return an error if the request is malformed or does not suit the model."""
    if isinstance(request.fields, _Failure):
        return request.fields
    try:
        return _stream(model, request.fields, defaults)
    except PrecastError as error:
        return _Failure(_INVALID, str(error))
    except RecursionError:  # the checks may need more stack than the JSON parser did
        return _Failure(_INVALID, f"request: expected a JSON object, found {_TOO_DEEP}.")


def _stream(model: "Model", request: Mapping[str, Any], defaults: _Defaults) -> "Stream":
    """Start the generation of a request.

    Raises:
        PrecastError: the request is malformed, or does not suit the model.
    """
    fields = request_fields(request)
    prompt, messages, tools = (fields.pop(name, None) for name in ("prompt", "messages", "tools"))
    choice, variables = (fields.pop(name, None) for name in ("tool_choice", "chat_template_kwargs"))
    if (prompt is None) == (messages is None):
        found = "neither" if prompt is None else "both"
        raise PrecastError(f"request: expected either prompt or messages, found {found}.")
    given = replace(defaults.params, **fields)
    if prompt is not None:
        for name, value in (("tools", tools), ("tool_choice", choice), ("chat_template_kwargs", variables)):
            if value is not None:
                raise PrecastError(f"request: expected messages with {name}, found a prompt.")
        return model.stream(prompt, given)
    if choice == "none":
        # Without tools, the template offers no tools to the model, and the parser treats no text as a tool call.
        tools, choice = None, None
    if variables is None or isinstance(variables, Mapping):
        variables = {**defaults.variables, **(variables or {})} or None
    return model.stream_chat(
        messages, given, tools=tools, tool_choice=_tool_choice(choice), template_variables=variables
    )


def _tool_choice(choice: Any) -> str:
    """Convert OpenAI's `tool_choice` to the argument of `Model.chat`."""
    match choice:
        case None:
            return AUTO
        case str() if choice in (AUTO, REQUIRED):
            return choice
        case {"type": "function", "function": {"name": str(name)}} if name not in (AUTO, REQUIRED):
            return name
    raise PrecastError(
        'request: tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": NAME}},'
        f" found {choice!r:.80}."
    )


def request_fields(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a request, with OpenAI's sampling parameters under precast's names.

    Args:
        request: a request of this module, or of OpenAI's batch API.

    Raises:
        PrecastError: a field is malformed, or asks for something that a batch does not support.
    """
    body = request.get("body", request)
    if not isinstance(body, Mapping):
        raise PrecastError(f"request: body must be an object, found {body!r:.60}.")
    # As in OpenAI's API, null means the default.
    fields = {name: value for name, value in body.items() if value is not None}
    if "body" not in request:
        fields.pop("custom_id", None)
    for name in _IGNORED:
        fields.pop(name, None)
    for name, supported in _SUPPORTED.items():
        if (value := fields.pop(name, None)) not in supported:
            raise PrecastError(f"request: {name} must be {json.dumps(supported[0])}, found {value!r:.60}.")
    if (limit := fields.pop("max_completion_tokens", None)) is not None:
        fields["max_tokens"] = limit
    if isinstance(fields.get("stop"), str):
        fields["stop"] = (fields["stop"],)
    return fields | _schema_of(fields.pop("response_format", None))


def _schema_of(response_format: Any) -> dict[str, Any]:
    """Convert OpenAI's `response_format` to sampling parameters."""
    match response_format:
        case None | {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"json_schema": {"type": "object"}}
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return {"json_schema": schema}
    raise PrecastError(
        "request: response_format must have the type text, json_object or json_schema, found"
        f" {response_format!r:.60}."
    )


def _record(request: _Request, result: "Completion | _Failure") -> dict[str, Any]:
    record: dict[str, Any] = {} if request.custom_id is None else {"custom_id": request.custom_id}
    record["key"] = request.key
    if isinstance(result, _Failure):
        return record | {"error": result._asdict()}
    record |= {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": len(result.prompt_token_ids),
        "completion_tokens": len(result.token_ids),
    }
    if result.reasoning:
        record["reasoning"] = result.reasoning
    if result.tool_calls:
        record["tool_calls"] = result.message()["tool_calls"]
    if result.logprobs:
        record["logprobs"] = [
            {"token_id": t.token_id, "text": t.text, "logprob": t.logprob} for t in result.logprobs
        ]
    return record


# --- Parquet ------------------------------------------------------------------------------------------------


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise PrecastError(
            "Parquet files need pyarrow, which is not installed: pip install 'precast[parquet]'"
        ) from None
    return pyarrow


def _parquet(source: Path) -> Any:
    arrow = _pyarrow()
    try:
        return arrow.parquet.ParquetFile(source)
    except (OSError, arrow.ArrowException) as error:
        raise PrecastError(
            f"{source}: cannot be read as Parquet ({str(error).splitlines()[0]}); check the path and the file."
        ) from None


def _write_parquet(records: Path, target: Path) -> None:
    """Write records as a Parquet file with a column for each field; lists and numeric ids become JSON text."""
    arrow = _pyarrow()
    text, count = arrow.string(), arrow.int64()
    error = arrow.struct([("code", text), ("message", text)])
    types = {"prompt_tokens": count, "completion_tokens": count, "error": error}
    names = (
        "custom_id",
        "key",
        "text",
        "finish_reason",
        "prompt_tokens",
        "completion_tokens",
        "reasoning",
        "tool_calls",
        "logprobs",
        "error",
    )
    schema = arrow.schema([(name, types.get(name, text)) for name in names])
    partial = target.with_name(target.name + ".partial")
    with records.open("rb") as file, arrow.parquet.ParquetWriter(partial, schema) as writer:
        while lines := list(islice(file, _WINDOW)):
            rows = [
                {name: value if name in types else _text(value) for name, value in json.loads(line).items()}
                for line in lines
            ]
            writer.write_table(arrow.Table.from_pylist(rows, schema=schema))
    os.replace(partial, target)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode(errors="backslashreplace").decode()  # a lone surrogate becomes a JSON escape
