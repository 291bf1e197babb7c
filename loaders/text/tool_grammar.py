"""The grammar of an answer that is nothing but tool calls, in llguidance's variant of Lark's syntax.

The arguments of a call follow the JSON Schema of its tool.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..artifact.errors import PrecastError

if TYPE_CHECKING:
    from .answer_formats import AnswerFormat
    from .tokenizer import Tokenizer

# The choice that requires a call, of any tool. Every other choice is the name of the tool to call.
REQUIRED = "required"
_MOST_CALLS = 16
# Separators as templates write them. If any whitespace were allowed, a model might repeat it without end.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def tool_grammar(
    form: "AnswerFormat",
    tools: Sequence[Mapping[str, Any]],
    choice: str,
    tokenizer: "Tokenizer",
    *,
    closes_reasoning: bool,
) -> str:
    """Return the grammar of 1 to 16 calls, or of exactly 1 call for the family "llama3".

    Args:
        form: the form of the answer.
        tools: JSON schemas of the tools; a tool may lack the outer key "function".
        choice: "required" for calls of any tools, or the name of the only tool to call.
        tokenizer: the model's tokenizer.
        closes_reasoning: True if the prompt has opened the reasoning, which the answer then closes at once.

    Raises:
        PrecastError: no tool has this name, or the family's calls are not JSON.
    """
    functions = [tool.get("function", tool) for tool in tools]
    chosen = [f for f in functions if choice in (REQUIRED, f.get("name"))]
    if not chosen:
        raise PrecastError(
            f"tool_choice: expected {REQUIRED!r}, 'auto' or the name of a tool, found {choice!r:.60}."
        )
    marks = {text: _mark(tokenizer, text) for text in form.markers()}
    is_named = form.name == "mistral" and marks["[ARGS]"].startswith("<")
    key = "parameters" if form.name == "llama3" else "arguments"
    lines = [
        f"start: {_opening(form, marks, closes_reasoning=closes_reasoning)}{_calls(form.name, marks, is_named)}"
    ]
    lines.append("call: " + " | ".join(f"call_{n}" for n in range(len(chosen))))
    for n, function in enumerate(chosen):
        name = function.get("name")
        schema = {**(function.get("parameters") or {"type": "object"}), "x-guidance": _LAYOUT}
        if is_named:
            call = f"{json.dumps(name)} {marks['[ARGS]']} arguments_{n}"
        else:
            before = f'{{"name": {json.dumps(name)}, "{key}": '
            call = f'{json.dumps(before)} arguments_{n} "}}"'
        # "&" is an operator of grammars. `constraint_texts` bounds the number of its occurrences, even within JSON.
        text = json.dumps(schema).replace("&", "\\u0026")
        lines += [f"call_{n}: {call}", f"arguments_{n}: %json {text}"]
    return "\n".join(lines)


def _opening(form: "AnswerFormat", marks: Mapping[str, str], *, closes_reasoning: bool) -> str:
    return f'{marks[form.reasoning[0].closing]} "\\n\\n" ' if closes_reasoning else ""


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
        f"tool_choice: calls of the family {family!r} cannot be required; leave out tool_choice, or give the"
        " answer_format of another family."
    )


def _mark(tokenizer: "Tokenizer", text: str) -> str:
    """Return a marker for a grammar: its token if `vocabulary_bytes` treats the token as special, else its text."""
    library = tokenizer.library
    token, added = library.token_to_id(text), library.get_added_tokens_decoder()
    if token in added and (added[token].special or (text.startswith("<") and text.endswith(">"))):
        return f"<[{token}]>"
    return json.dumps(text)
