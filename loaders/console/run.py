"""The command ``precast run``: load an artifact and answer one prompt."""

import atexit
import gc
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact.errors import PrecastError
from ..artifact.frozen import Frozen
from ..artifact.interrupt import raise_on_interrupt
from ..collection import no_collection
from .clock import process_age
from .terminal import escaped, harmless_pieces

if TYPE_CHECKING:
    from ..generation.model import Message, Model
    from ..generation.sampling_params import SamplingParams
    from ..generation.state_file import State
    from ..generation.stream import Completion, Stream


class Prompt(Frozen):
    """A prompt and its format.

    Attributes:
        text: the text; None if `ids` is set, or if the text is typed or piped in.
        ids: token ids, or None.
        chat: format the text with the chat template.
        system: the system message, which may be empty; None for no system message.
        literal: treat messages as plain text.
        state: file of the saved sequence to continue, in which the longer sequence is saved; None for no file.
        template_variables: further variables of the chat template.
    """

    text: str | None
    ids: tuple[int, ...] | None
    chat: bool
    system: str | None
    literal: bool
    state: Path | None = None
    template_variables: Mapping[str, Any] | None = None

    @property
    def uses_template(self) -> bool:
        """Return True if the prompt is formatted with the chat template."""
        return bool(self.chat or self.literal or self.template_variables or self.system is not None)


class LoadOptions(Frozen):
    """The command line's options for loading."""

    rehash: bool
    target: str | None
    allow_compile: bool
    require_signature: Path | None
    threads: int | None

    def given(self) -> Mapping[str, Any]:
        """Return the options as arguments of `load`."""
        return vars(self)


_ANY_OBJECT = '{"type": "object"}'


class SamplingOptions(Frozen):
    """The command line's options for sampling. None selects the model's own default."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float]
    no_repeat_ngram_size: int | None
    min_tokens: int | None
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    bad_words: tuple[str, ...]
    ignore_eos: bool
    json_schema: str | None
    json_object: bool
    regex: str | None
    grammar: str | None
    choice: tuple[str, ...]

    def given(self) -> Mapping[str, Any]:
        """Return the options that were given, as sampling parameters.

        Raises:
            PrecastError: --json-object and --json-schema are combined.
        """
        given = {key: value for key, value in vars(self).items() if value not in (None, (), {})}
        if given.pop("json_object") and given.setdefault("json_schema", _ANY_OBJECT) != _ANY_OBJECT:
            raise PrecastError("--json-object and --json-schema cannot be combined; give one of them.")
        return given


class AnswerOptions(Frozen):
    """The options of `run` for the number, the contents and the format of answers.

    Attributes:
        answers: number of answers.
        logprobs: number of alternatives to each token of the answer; None for no log-probabilities.
        prompt_logprobs: number of alternatives to each token of the prompt; None for no log-probabilities.
        echo: begin with the prompt.
        tools: file with the JSON schemas of tools, or None.
        answer_format: model family whose tool-call syntax to expect; None to detect it from the chat template.
        tool_choice: name of the tool to call; "required" for a call of any tool, "auto" to let the model choose.
    """

    answers: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    tools: Path | None = None
    answer_format: str | None = None
    tool_choice: str = "auto"

    def given(self) -> Mapping[str, Any]:
        """Return the options that are sampling parameters."""
        return {"logprobs": self.logprobs, "prompt_logprobs": self.prompt_logprobs, "echo": self.echo}


_PLAIN_ANSWER = AnswerOptions()


def run(
    artifact: Path | str,
    prompt: Prompt,
    *,
    sampling: SamplingOptions,
    loading: LoadOptions,
    as_json: bool,
    stats: bool,
    answers: AnswerOptions = _PLAIN_ANSWER,
) -> int:
    """Load an artifact and answer a prompt on standard output, or chat on a terminal.

    Returns:
        The exit code, 0.

    Raises:
        PrecastError: the artifact does not load, or an option or the prompt is invalid.
    """
    _check(prompt)
    if answers != _PLAIN_ANSWER:
        # A lazy import, because it would delay plain answers.
        from . import answer

        answer.check(answers, prompt, as_json=as_json)
    is_typed = prompt.text is None and prompt.ids is None and sys.stdin.isatty()
    is_chat = is_typed and sys.stdout.isatty()
    if is_chat and answers != _PLAIN_ANSWER:
        raise PrecastError("--echo and the options for tools need a prompt: give one with -p, or pipe it in.")
    if is_typed and as_json:
        raise PrecastError("--json needs a prompt: give one with -p or --ids, or pipe it in.")

    with fast_start(artifact):
        # Freeze all objects, so that Python's garbage collection at exit skips them. The collection would take 5% of a
        # short answer's time, and the exit frees all memory anyway.
        atexit.register(gc.freeze)
        from ..load import load

        imported = process_age()
        model = load(
            artifact,
            **loading.given(),
            # The process ends after a single answer, so it would never use a prefix again.
            prefix_memory=None if is_chat or prompt.state is not None else 0,
        )
    loaded = process_age()
    params = replace(model.default_sampling(), **sampling.given(), **answers.given())
    before = _saved(model, prompt)
    if not is_chat:
        started = (imported, loaded)
        return _answer(model, prompt, before, params, answers, as_json=as_json, stats=stats, started=started)
    from .conversation import converse

    with raise_on_interrupt():  # KeyboardInterrupt ends an answer and resets the terminal
        opening = _opening(prompt.system, before)
        converse(
            model,
            params,
            opening,
            stats=stats,
            literal=prompt.literal,
            template_variables=prompt.template_variables,
            state=prompt.state,
        )
    return 0


def _saved(model: "Model", prompt: Prompt) -> "State | None":
    """Return the saved sequence that the prompt continues, or None."""
    if prompt.state is None:
        return None
    from . import state

    return state.load(model, prompt.state, prompt)


def _answer(
    model: "Model",
    prompt: Prompt,
    before: "State | None",
    params: "SamplingParams",
    answers: AnswerOptions,
    *,
    as_json: bool,
    stats: bool,
    started: tuple[float, float],
) -> int:
    """Answer a single prompt; return the exit code, 0.

    `started` contains the age of the process in seconds after the imports, and its age after the load.
    """
    text = _read_text(prompt)
    messages = _messages(prompt, text, before)
    asked = process_age()
    if answers.answers > 1:
        done = _several(model, prompt, text, messages, params, answers)
    else:
        stream = _stream(model, prompt, text, messages, params, before=before, answers=answers)
        asked = process_age()
        if not as_json:
            _write_pieces(stream)
        done = [stream.finish()]
    if as_json:
        for completion in done:
            print(_json_line(model, completion, answers, started=started, asked=asked))
    if prompt.state is not None:
        from . import state

        state.save(model, prompt.state, done[0], messages)
    if stats:
        from .speed import full

        print(full(done, asked + done[0].timing.prefill_s), file=sys.stderr)
    return 0


@contextmanager
def fast_start(artifact: Path | str) -> Iterator[None]:
    """Limit OpenBLAS to one thread inside the block, and turn garbage collection off if the artifact is a folder.

    Args:
        artifact: a path or a URL. Garbage collection stays on for a URL, because a pull creates garbage and takes
            longer than a collection.
    """
    threads = "OPENBLAS_NUM_THREADS"
    limited = threads in os.environ
    # NumPy multiplies no matrices here. More OpenBLAS threads would only spin, and take a tenth of the start-up time.
    os.environ.setdefault(threads, "1")
    try:
        # A load creates no garbage, and a search for garbage would take a fortieth of the start-up time.
        with no_collection() if isinstance(artifact, Path) else nullcontext():
            yield
    finally:
        if not limited:
            os.environ.pop(threads, None)


def _check(prompt: Prompt) -> None:
    if prompt.text is not None and prompt.ids is not None:
        raise PrecastError("--prompt and --ids cannot be combined; give one of them.")
    if prompt.uses_template and prompt.ids is not None:
        given = {
            "--chat": prompt.chat,
            "--literal": prompt.literal,
            "--template-variable": prompt.template_variables,
            "--system": True,
        }
        option = next(name for name, value in given.items() if value)
        raise PrecastError(
            f"{option} needs text to format with the chat template; use --prompt instead of --ids."
        )


def _read_text(prompt: Prompt) -> str:
    """Return the prompt's text, or "" for token ids. If no text was given, read it from standard input."""
    if prompt.ids is not None:
        return ""
    if prompt.text is not None:
        return prompt.text
    if sys.stdin.isatty():
        print("Type the prompt; Ctrl-D on an empty line ends it.", file=sys.stderr)
    try:
        return piped_text(sys.stdin.read())
    except UnicodeDecodeError as error:
        raise PrecastError(
            f"standard input: expected a prompt in {error.encoding}, found other bytes; convert the text first."
        ) from None


def piped_text(text: str) -> str:
    """Remove a byte order mark, the CR of each CRLF, and one final newline, which editors and shells add to a text."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n")


def _opening(system: str | None, before: "State | None") -> "list[Message]":
    """Return the messages before the user's new message: the saved chat, or else the system message, or else none."""
    if before is not None:
        return list(before.messages)
    return [] if system is None else [{"role": "system", "content": system}]


def _messages(prompt: Prompt, text: str, before: "State | None") -> "list[Message]":
    """Return the conversation to answer, or an empty list if the prompt is text to continue."""
    if not prompt.uses_template and not (before is not None and before.messages):
        return []
    if not text.strip():
        raise PrecastError("prompt: expected some text, found none; give it with -p or pipe it in.")
    return [*_opening(prompt.system, before), {"role": "user", "content": text}]


def _stream(
    model: "Model",
    prompt: Prompt,
    text: str,
    messages: "list[Message]",
    params: "SamplingParams",
    *,
    before: "State | None",
    answers: AnswerOptions,
) -> "Stream":
    if messages:
        return model.stream_chat(
            messages,
            params,
            tools=_tools(answers.tools),
            literal=prompt.literal,
            answer_format=answers.answer_format,
            tool_choice=answers.tool_choice,
            template_variables=prompt.template_variables,
        )
    if before is not None:
        from . import state

        return model.stream(state.continued(model, before, prompt, text), params)
    return model.stream(text if prompt.ids is None else prompt.ids, params)


def _tools(path: Path | None) -> "list[dict[str, Any]] | None":
    if path is None:
        return None
    from .answer import read_tools

    return read_tools(path)


def _several(
    model: "Model",
    prompt: Prompt,
    text: str,
    messages: "list[Message]",
    params: "SamplingParams",
    answers: AnswerOptions,
) -> "list[Completion]":
    if messages:
        return model.chat_answers(
            messages,
            answers.answers,
            params,
            tools=_tools(answers.tools),
            literal=prompt.literal,
            answer_format=answers.answer_format,
            tool_choice=answers.tool_choice,
            template_variables=prompt.template_variables,
        )
    return model.generate_answers(text if prompt.ids is None else prompt.ids, answers.answers, params)


def _write_pieces(stream: "Stream") -> None:
    is_terminal = sys.stdout.isatty()
    pieces: Iterable[str]
    if stream.is_split:
        from .answer import write

        pieces = write(stream, is_terminal=is_terminal)
    else:
        pieces = harmless_pieces(stream) if is_terminal else stream
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _json_line(
    model: "Model",
    completion: "Completion",
    answers: AnswerOptions,
    *,
    started: tuple[float, float],
    asked: float,
) -> str:
    imported, loaded = started
    timing = completion.timing
    record: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "prompt_token_ids": completion.prompt_token_ids,
        "finish_reason": completion.finish_reason,
        "timing": {
            "import_s": round(imported, 4),
            "load_s": round(loaded - imported, 4),
            "prefill_s": round(timing.prefill_s, 4),
            "first_token_s": round(asked + timing.prefill_s, 4),
            "decode_tokens_per_s": round(timing.decode_tokens_per_s, 2),
            "cached_tokens": timing.cached_tokens,
            "target": model.target.name,
        },
        "target": model.target.name,
        "compiles": model.compiles,
    }
    if completion.reasoning or completion.tool_calls or answers != _PLAIN_ANSWER:
        from .answer import details

        record |= details(completion, answers)
    # If the encoding of the output is not Unicode, use JSON's escapes, so that no character is lost.
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    return escaped(json.dumps(record, ensure_ascii=not encoding.startswith("utf")))
