"""The grammar of an answer that must or may contain tool calls, in llguidance's variant of Lark's syntax.

The arguments of a call follow the JSON Schema of its tool.
"""

import json
import re
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple

from ..artifact.errors import PrecastError
from .tool_calls import NamedJsonBody, tool_schemas
from .vocabulary_bytes import grammar_symbol

if TYPE_CHECKING:
    from .answer_formats import AnswerFormat, CallSyntax
    from .tokenizer import Tokenizer

# Whitespace as the parser of answers sees it. In Rust's syntax, \s lacks four control characters.
_SPACE = r"[\s\x1c-\x1f]"
# The choice that requires a call of any tool. Every other choice is the name of the tool to call.
REQUIRED = "required"
_MOST_CALLS = 16
# The separators that templates write. If the grammar allowed any whitespace, a model might repeat it without end.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# The keys of a schema that says nothing about properties that it does not list.
_LISTING = {"$defs", "$schema", "definitions", "description", "properties", "required", "title", "type"}


class ToolGrammar(NamedTuple):
    """The grammar of tool calls.

    Attributes:
        lark: the grammar, which refers to the schemas as ``@arguments_0``, ``@arguments_1`` and so on.
        schemas: pairs of a tool's name and the JSON Schema of its arguments.
    """

    lark: str
    schemas: Sequence[tuple[str, dict[str, Any]]]


def tool_grammar(
    form: "AnswerFormat", tools: Sequence[Mapping[str, Any]], choice: str, tokenizer: "Tokenizer"
) -> ToolGrammar:
    """Return the grammar of an answer of 1 to 16 calls, or of exactly 1 call for the family "llama3".

    Args:
        form: the form of the answer.
        tools: a result of `checked_tools`.
        choice: "required" for calls of any tools, or the name of the only tool to call.
        tokenizer: the model's tokenizer.

    Raises:
        PrecastError: no tool has the chosen name, the calls of the model family are not JSON, or a call cannot contain
            a tool's name.
    """
    chosen = [(name, schema) for name, schema in tool_schemas(tools).items() if choice in (REQUIRED, name)]
    if not chosen:
        raise PrecastError(
            f"tool_choice: expected {REQUIRED!r}, 'auto' or the name of a tool, found {choice!r:.60}."
        )
    calls, rules = _rules(form, [name for name, _ in chosen], tokenizer)
    lark = "\n".join((f"start: {calls}", *rules))
    return ToolGrammar(lark, [(name, _arguments(schema)) for name, schema in chosen])


def free_tool_grammar(
    form: "AnswerFormat", tools: Sequence[Mapping[str, Any]], strict: Set[str], tokenizer: "Tokenizer"
) -> ToolGrammar:
    """Return the grammar of an answer of any text, which calls as those of `tool_grammar` may follow.

    Args:
        form: the form of the answer.
        tools: a result of `checked_tools`.
        strict: the names of the tools whose schemas apply. The arguments for other tools are any objects.
        tokenizer: the model's tokenizer.

    Raises:
        PrecastError: as for `tool_grammar`.
    """
    chosen = {name: schema if name in strict else {} for name, schema in tool_schemas(tools).items()}
    calls, rules = _rules(form, list(chosen), tokenizer)
    opening = form.calls[0].opening
    symbol = grammar_symbol(tokenizer, opening)
    if form.name == "llama3":  # calls have no marker; they begin the answer as an object or a list
        start = "TEXT? | call"
        rules.append(rf"TEXT: /{_SPACE}*[^\s\x1c-\x1f{{\[](.|\n)*/{_without(form.calls)}")
    elif symbol.startswith("<"):
        start = f"TEXT? ({calls})?"
        rules.append(rf"TEXT: /(.|\n)+/{_without(form.calls)}")
    else:
        # The text before a call ends with the first marker, or the marker itself could be text.
        start = f"TEXT? | lead {calls.removeprefix(symbol)}"
        rules.append(rf"lead[suffix={symbol}]: /(.|\n)*/{_without(form.calls[1:])}")
        rules.append(rf"TEXT: /(.|\n)+/{_without(form.calls)}")
    lark = "\n".join((f"start: {start}", *rules))
    return ToolGrammar(lark, [(name, _arguments(schema)) for name, schema in chosen.items()])


def _without(syntaxes: "Sequence[CallSyntax]") -> str:
    """Return the intersection that excludes texts with the opening marker of a call."""
    openings = [(syntax.at_start, re.escape(syntax.opening)) for syntax in syntaxes if syntax.opening]
    places = ((f"{_SPACE}*" if at_start else r"(.|\n)*", opening) for at_start, opening in openings)
    return "".join(rf" & ~/{place}{opening}(.|\n)*/" for place, opening in places)


def _rules(form: "AnswerFormat", names: Sequence[str], tokenizer: "Tokenizer") -> tuple[str, list[str]]:
    """Return the expression for one or more calls, and the rules that the expression uses.

    Raises:
        PrecastError: the calls of the model family are not JSON, or a call cannot contain a tool's name.
    """
    marks = {text: grammar_symbol(tokenizer, text) for text in form.markers()}
    is_named = form.name == "mistral" and marks["[ARGS]"].startswith("<")
    key = "parameters" if form.name == "llama3" else "arguments"
    lines = ["call: " + " | ".join(f"call_{n}" for n in range(len(names)))]
    for n, name in enumerate(names):
        if is_named:
            if NamedJsonBody.NAME.fullmatch(name) is None:
                raise PrecastError(
                    f"tools: calls of the family {form.name!r} allow only letters, digits, '_', '-', '.' and ':'"
                    f" in a tool's name, found {name!r:.60}; rename the tool."
                )
            call = f"{json.dumps(name)} {marks['[ARGS]']} @arguments_{n}"
        else:
            before = f'{{"name": {json.dumps(name)}, "{key}": '
            call = f'{json.dumps(before)} @arguments_{n} "}}"'
        lines.append(f"call_{n}: {call}")
    return _calls(form.name, marks, is_named), lines


def _arguments(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema for a call's arguments: a schema that only lists properties allows no others.

    A small model would otherwise invent further arguments without end.
    """
    names, required = schema.get("properties"), schema.get("required") or []
    is_closed = False
    # A malformed schema stays unchanged, so that the grammar's error refers to the user's own schema.
    if isinstance(names, Mapping) and isinstance(required, list | tuple) and schema.keys() <= _LISTING:
        is_closed = all(isinstance(name, str) and name in names for name in required)
    closing = {"additionalProperties": False} if is_closed else {}
    return {"type": "object", **schema, **closing, "x-guidance": _LAYOUT}


def _calls(family: str, marks: Mapping[str, str], is_named: bool) -> str:
    """Return the right-hand side of the rule for one or more calls."""
    more = f"{{0,{_MOST_CALLS - 1}}}"
    array = f'"[" call (", " call){more} "]"'
    if family in ("hermes", "smollm3"):
        one = f'{marks["<tool_call>"]} "\\n" call "\\n" {marks["</tool_call>"]}'
        return f'{one} ("\\n" {one}){more}'
    if family == "llama3":
        return "call"
    if family in ("phi4", "granite"):
        closing = f" {marks['<|/tool_call|>']}" if family == "phi4" else ""
        return f"{marks['<|tool_call|>']} {array}{closing}"
    if family == "mistral":
        opening = marks["[TOOL_CALLS]"]
        return f"({opening} call){{1,{_MOST_CALLS}}}" if is_named else f'{opening} " " {array}'
    raise PrecastError(
        f"tools: calls of the family {family!r} can be neither required nor strict; leave out tool_choice and"
        " strict, or set answer_format to another family."
    )
