"""The printed form of answers in `run` and `chat`: reasoning, tool calls, and further keys of JSON lines."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact.errors import PrecastError
from .terminal import DIM, RESET, escaped, harmless_pieces, has_colours

if TYPE_CHECKING:
    from ..generation.logprobs import TokenLogprob
    from ..generation.stream import Completion, Stream
    from ..text.answer_parser import Delta
    from ..text.tool_calls import ToolCall
    from .run import AnswerOptions, Prompt

# The lowest log-probability in JSON lines, as in OpenAI's API and vLLM, because JSON has no infinity.
_LOWEST = -9999.0


def check(options: "AnswerOptions", prompt: "Prompt", *, as_json: bool) -> None:
    """Check that the options for answers are compatible with each other and with the prompt.

    Raises:
        PrecastError: an option needs or excludes another option, or the number of answers is below 1.
    """
    for name, is_given in (
        ("--answers", options.answers != 1),
        ("--logprobs", options.logprobs is not None),
        ("--prompt-logprobs", options.prompt_logprobs is not None),
    ):
        if is_given and not as_json:
            raise PrecastError(f"{name} needs --json, which prints one line for each answer; add --json.")
    for name, value in (("--tools", options.tools), ("--answer-format", options.answer_format)):
        if value is not None and not prompt.uses_template and prompt.state is None:
            raise PrecastError(f"{name} needs a prompt formatted with the chat template; add --chat.")
    if options.tool_choice != "auto" and options.tools is None:
        raise PrecastError("--tool-choice needs the tools to choose from; add --tools FILE.")
    for name, is_given in (("--answers", options.answers != 1), ("--echo", options.echo)):
        if is_given and prompt.state is not None:
            raise PrecastError(f"{name} and --state cannot be combined; give one of them.")
    if options.answers < 1:
        raise PrecastError(f"--answers: expected a number of at least 1, found {options.answers}.")


def read_tools(path: Path) -> list[dict[str, Any]]:
    """Return the tools in a file.

    Raises:
        PrecastError: the file cannot be read, or it does not contain an array of tools.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PrecastError(f"--tools: cannot read {path}: {error.strerror}.") from None
    from ..artifact.json_records import parse_json
    from ..text.tools import checked_tools

    return checked_tools(
        parse_json(data, f"--tools {path}", "write a JSON array of tools"), f"--tools {path}"
    )


def write(stream: "Stream", *, is_terminal: bool) -> Iterator[str]:
    """Yield an answer as printed text: its content, then a line of JSON for each tool call.

    A terminal also shows the reasoning, dimmed.
    """
    if is_terminal and stream.is_split:
        yield from shown(stream.events())
        return
    yield from harmless_pieces(stream) if is_terminal else stream
    for call in stream.completion.tool_calls:
        yield f"\n{_call_line(call)}"


def shown(deltas: "Iterable[Delta]") -> Iterator[str]:
    """Yield an answer in pieces for a terminal: dimmed reasoning, content, and a line of JSON for each tool call."""
    from ..text.answer_parser import ContentDelta, ReasoningDelta, ToolCallDelta

    is_dimmed, separator = has_colours(), ""
    for kind, group in groupby(deltas, type):
        yield separator
        texts = harmless_pieces(delta.text for delta in group if not isinstance(delta, ToolCallDelta))
        if kind is ContentDelta:
            yield from texts
        elif kind is ToolCallDelta:
            yield "\n".join(_call_line(delta.call) for delta in group if isinstance(delta, ToolCallDelta))
        elif is_dimmed:
            # Dim each piece separately, so that the terminal does not stay dimmed after an interrupt.
            yield from (f"{DIM}{text}{RESET}" for text in texts)
        else:
            yield "<think>\n"
            yield from texts
            yield "\n</think>"
        separator = "\n\n" if kind is ReasoningDelta else "\n"


def details(completion: "Completion", options: "AnswerOptions") -> dict[str, Any]:
    """Return the optional keys of an answer's JSON line, with their values."""
    found: dict[str, Any] = {}
    if completion.reasoning:
        found["reasoning"] = completion.reasoning
    if completion.tool_calls:
        found["tool_calls"] = [call._asdict() for call in completion.tool_calls]
    if options.logprobs is not None:
        found["logprobs"] = _records(completion.logprobs)
    if options.prompt_logprobs is not None:
        found["prompt_logprobs"] = _records(completion.prompt_logprobs)
    return found


def _call_line(call: "ToolCall") -> str:
    name = json.dumps(call.name, ensure_ascii=False)
    return escaped(f'{{"name": {name}, "arguments": {call.arguments}}}')


def _records(logprobs: "Sequence[TokenLogprob | None]") -> list[dict[str, Any] | None]:
    def plain(record: "TokenLogprob") -> dict[str, Any]:
        return {
            "token_id": record.token_id,
            "text": record.text,
            "logprob": max(round(record.logprob, 6), _LOWEST),
        }

    return [
        None if record is None else {**plain(record), "top": [plain(other) for other in record.top]}
        for record in logprobs
    ]
