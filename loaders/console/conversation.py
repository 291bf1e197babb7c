"""A chat in the terminal."""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact.errors import PrecastError, printable
from . import chat_input, speed
from .answer import write
from .chat_history import History, history_file
from .terminal import DIM, RESET, has_colours

if TYPE_CHECKING:
    from ..generation.model import Message, Model
    from ..generation.sampling_params import SamplingParams
    from ..generation.stream import Completion, Stream


def converse(
    model: "Model",
    params: "SamplingParams",
    opening: "list[Message]",
    *,
    stats: bool,
    literal: bool,
    template_variables: Mapping[str, Any] | None = None,
    state: Path | None = None,
) -> None:
    """Answer typed messages until the end of input. Then save the chat if `state` is given.

    Args:
        model: a model with a chat template.
        params: the sampling parameters.
        opening: the messages before the user's first message, or the messages of a saved chat.
        stats: at the end, print the speed of all answers on standard error.
        literal: treat messages as plain text.
        template_variables: further variables of the chat template.
        state: file to which the chat is saved, or None.

    Raises:
        PrecastError: the model has no chat template, or the state cannot be saved.
    """
    if model.manifest.tokenizer.chat_template is None:
        raise PrecastError(
            f"{model.manifest.name}: the model has no chat template, so it cannot chat; give it"
            " a text to continue (precast run --prompt)."
        )
    history = History(history_file())
    chat_input.prepare(history)
    print(
        f"{_name(model)}, {model.engine.context} positions. /help lists the commands, Ctrl-D ends the chat."
    )
    if any(message.get("role") == "user" for message in opening):
        print(f"{printable(str(state))}: {len(opening)} messages. /reset starts over.")
    done: list[Completion] = []
    messages = opening
    for message in chat_input.messages():
        if message == "/exit":
            break
        if message == "/reset":
            messages = _system_messages(opening)
        elif message == "/help":
            print(chat_input.help_text())
        else:
            chat_input.remember(history, message)
            asked = [*messages, {"role": "user", "content": message}]
            start = partial(
                model.stream_chat, asked, params, literal=literal, template_variables=template_variables
            )
            messages = _answer(start, asked, done)
    if state is not None and done:
        # Save the tokens up to the last complete answer, without the tokens of an interrupted answer.
        model.save_state(state, done[-1], messages=messages)
    if history.problem:
        print(printable(history.problem), file=sys.stderr)
    if stats and done:
        print(speed.full(done), file=sys.stderr)


def _system_messages(messages: "list[Message]") -> "list[Message]":
    """Return the system messages at the beginning of a conversation."""
    return list(takewhile(lambda message: message.get("role") == "system", messages))


def _name(model: "Model") -> str:
    return printable(f"{model.manifest.name} on {model.target.name}")


def _answer(
    start: "Callable[[], Stream]", messages: "list[Message]", done: "list[Completion]"
) -> "list[Message]":
    """Print the answer, and append it to `done` once it is complete.

    Returns:
        The conversation with the answer; or the conversation without the last message if it cannot be answered.
    """
    stream = None
    try:
        stream = start()
        for piece in write(stream, is_terminal=True):
            print(piece, end="", flush=True)
        print()
        done.append(stream.completion)
        _print_aside(speed.brief(stream.completion))
    except KeyboardInterrupt:
        print(" …")
    except PrecastError as error:
        print(f"error: {error} /reset starts over.")
        return messages[:-1]
    return [
        *messages,
        {"role": "assistant", "content": ""} if stream is None else stream.completion.message(),
    ]


def _print_aside(words: str) -> None:
    """Print a secondary line: dimmed, or in brackets if colours are off."""
    print(f"{DIM}{words}{RESET}" if has_colours() else f"({words})")
