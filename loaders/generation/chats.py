"""The form of the answer to a chat: its parts, and the tools that it must call."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..artifact.errors import PrecastError
from ..text.answer_formats import answer_format

if TYPE_CHECKING:
    from ..text.answer_parser import AnswerParser
    from ..text.tokenizer import Tokenizer
    from .sampling_params import SamplingParams

AUTO = "auto"
# A tag that opens the reasoning is found if it is among this many tokens at the end of the prompt.
_TAIL = 16


class ChatForm(NamedTuple):
    """The arguments of `Model.chat` that decide the form of the prompt and of the answer."""

    tools: Sequence[Mapping[str, Any]] | None
    template: str | None
    literal: bool
    answer_format: str | None
    tool_choice: str


def parser_of(tokenizer: "Tokenizer", prompt: Sequence[int], form: ChatForm) -> "AnswerParser | None":
    """Return the parser of the answer to a prompt; None if all of the answer is content.

    Raises:
        PrecastError: the answer format is unknown, or the model has no template of the given name.
    """
    from ..text.chat_messages import ChatOptions

    source = tokenizer.chat_template(form.template, ChatOptions(tools=form.tools))
    found = answer_format(source, form.answer_format)
    if not found.reasoning and not (found.calls and form.tools):
        return None
    from ..text.answer_parser import AnswerParser
    from ..text.tool_calls import tool_schemas

    tail = tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False)
    return AnswerParser(found, tool_schemas(form.tools or ()), prompt_tail=tail)


def calling(
    params: "SamplingParams", parser: "AnswerParser | None", tokenizer: "Tokenizer", form: ChatForm
) -> "SamplingParams":
    """Return the parameters with a grammar that restricts the answer to tool calls.

    Raises:
        PrecastError: there are no tools, none has the chosen name, the template's form of calls is not JSON, or the
            parameters have a constraint already.
    """
    if parser is None or not parser.form.calls or not form.tools:
        raise PrecastError(
            "tool_choice needs tools, and a chat template that prescribes the form of tool calls; give tools, and name"
            " the form with answer_format."
        )
    from ..text.tool_grammar import tool_grammar

    grammar = tool_grammar(
        parser.form, form.tools, form.tool_choice, tokenizer, closes_reasoning=parser.is_open
    )
    return replace(params, grammar=grammar)
