"""Choose the parser and the constraint for the answer to a chat."""

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple

from ..artifact.errors import PrecastError
from ..text.answer_formats import answer_format as format_of
from ..text.chat_messages import ChatOptions, plain_variables
from ..text.tools import checked_tools

if TYPE_CHECKING:
    from ..text.answer_parser import AnswerParser
    from ..text.tokenizer import Tokenizer
    from .constraint_texts import ConstraintText
    from .sampling_params import SamplingParams

AUTO = "auto"
# Number of tokens at the end of the prompt that are searched for the tag that opens the reasoning.
_TAIL = 16


class ChatForm(NamedTuple):
    """The arguments of `Model.chat` that decide the form of the prompt and of the answer."""

    tools: Sequence[Mapping[str, Any]] | None
    template: str | None
    literal: bool
    answer_format: str | None
    tool_choice: str
    template_variables: Mapping[str, Any] | None
    strict: Set[str] = frozenset()


def chat_form(
    tools: Sequence[Mapping[str, Any]] | None,
    template: str | None,
    literal: bool,
    answer_format: str | None,
    tool_choice: str,
    template_variables: Mapping[str, Any] | None,
    strict: Set[str] = frozenset(),
) -> ChatForm:
    """Check the tools and the template variables, and return a form that contains copies of them.

    The other arguments are those of `Model.chat`, except `strict`: the names of the tools whose schemas apply to calls
    even if the model is free to call tools.

    Raises:
        PrecastError: a tool is malformed, or a variable's name is reserved or its value is not JSON.
    """
    tools = None if tools is None else checked_tools(tools)
    variables = None if template_variables is None else plain_variables(template_variables)
    return ChatForm(tools, template, literal, answer_format, tool_choice, variables, strict)


def parser_of(tokenizer: "Tokenizer", prompt: Sequence[int], form: ChatForm) -> "AnswerParser | None":
    """Return the parser for the answer to a prompt; None if the whole answer is content.

    Raises:
        PrecastError: the answer format is unknown, or the model has no template of the given name.
    """
    source = tokenizer.chat_template(form.template, ChatOptions(tools=form.tools))
    found = format_of(source, form.answer_format)
    if not found.reasoning and not (found.calls and form.tools):
        return None
    from ..text.answer_parser import AnswerParser
    from ..text.tool_calls import tool_schemas

    tail = tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False)
    return AnswerParser(found, tool_schemas(form.tools or ()), prompt_tail=tail)


def constraint_of(
    params: "SamplingParams",
    parser: "AnswerParser | None",
    tokenizer: "Tokenizer",
    prompt: Sequence[int],
    form: ChatForm,
) -> "ConstraintText | None":
    """Return the constraint that `tool_choice` or the parameters put on the answer; None if there is no constraint.

    If the model reasons, the constraint applies to the text after the reasoning.

    Args:
        params: the sampling parameters.
        parser: the result of `parser_of`.
        tokenizer: the model's tokenizer.
        prompt: tokens of the prompt.
        form: the form of the chat.

    Raises:
        PrecastError: `tool_choice` or `strict` cannot be enforced. The cause is one of these: there are no
            tools; no tool has the chosen name; the model family's calls are not JSON, or cannot contain a tool's name;
            the tools exceed a limit; or the parameters contain a constraint or set ignore_eos.
    """
    text = params.constraint
    if form.tool_choice != AUTO or (form.tools and form.strict):
        text = _calls(params, parser, tokenizer, form)
    if text is None or parser is None or not parser.form.reasoning:
        return text
    from ..text.reasoning_grammar import reasoning_grammar

    shown = tokenizer.decode(prompt, skip_special_tokens=False)
    (syntax,) = parser.form.reasoning
    rule = reasoning_grammar(syntax, shown, tokenizer, is_open=parser.is_open)
    return text._replace(reasoning=rule)


def _calls(
    params: "SamplingParams", parser: "AnswerParser | None", tokenizer: "Tokenizer", form: ChatForm
) -> "ConstraintText":
    """Return the constraint of an answer that must, or may, contain tool calls."""
    if parser is None or not parser.form.calls or not form.tools:
        raise PrecastError(
            "tool_choice: expected tools, and a chat template that prescribes a known form of tool calls; give tools,"
            " or name the form with answer_format."
            if form.tool_choice != AUTO
            else "tools: strict needs a chat template that prescribes a known form of tool calls; leave out strict, or"
            " name the form with answer_format."
        )
    from ..text.tool_grammar import free_tool_grammar, tool_grammar
    from .constraint_texts import STRICT, TOOL_CHOICE, tool_constraint

    kind = STRICT if form.tool_choice == AUTO else TOOL_CHOICE
    if params.constraint is not None:
        raise PrecastError(
            f"Sampling parameters: {params.constraint.kind} and {kind} cannot be combined; give one of them."
        )
    if params.ignore_eos:
        raise PrecastError(
            f"Sampling parameters: ignore_eos must be false with {kind}, because only an end token can follow a"
            " complete answer."
        )
    if kind == STRICT:
        return tool_constraint(*free_tool_grammar(parser.form, form.tools, form.strict, tokenizer), kind)
    return tool_constraint(*tool_grammar(parser.form, form.tools, form.tool_choice, tokenizer), kind)
