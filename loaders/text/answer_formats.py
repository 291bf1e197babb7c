"""The syntax of tool calls and of reasoning in answers, for each model family.

A chat template prescribes the syntax, so the template's text identifies the family. llama.cpp and vLLM support the same
families.
"""

from collections.abc import Mapping

from ..artifact.errors import PrecastError
from ..artifact.frozen import Frozen

# The name of the format that leaves answers unchanged.
PLAIN = "text"


class CallSyntax(Frozen):
    """The syntax of tool calls. A body is the text of one or more calls, usually between two markers.

    Attributes:
        opening: the marker before a body; empty for bodies without markers.
        body: the kind of body, a key of `tool_calls.BODIES`.
        closing: the marker after a body, which models may omit; empty if the syntax has none.
        separator: the text between two bodies without closing markers; empty if the syntax has none.
        at_start: True if calls occur only at the start of an answer. The parser then accepts only calls of tools that
            the model was given, because an ordinary answer may look like a call.
    """

    opening: str
    body: str
    closing: str = ""
    separator: str = ""
    at_start: bool = False


class ReasoningSyntax(Frozen):
    """The syntax of the reasoning at the start of an answer.

    Attributes:
        opening: the marker before the reasoning.
        closing: the marker after the reasoning.
        answer_opening: the marker before the answer, which models may omit; empty if the syntax has none.
        answer_closing: the marker after the answer; empty if the syntax has none.
    """

    opening: str
    closing: str
    answer_opening: str = ""
    answer_closing: str = ""


class AnswerFormat(Frozen):
    """The format of an answer.

    Attributes:
        name: the model family.
        reasoning: possible syntaxes of the reasoning. The first one whose opening marker begins the answer applies.
        calls: possible syntaxes of tool calls.
    """

    name: str
    reasoning: tuple[ReasoningSyntax, ...]
    calls: tuple[CallSyntax, ...]

    def markers(self) -> frozenset[str]:
        """Return all markers. A marker may be a special token."""
        found = {text for syntax in self.calls for text in (syntax.opening, syntax.closing)}
        for syntax in self.reasoning:
            found |= {syntax.opening, syntax.closing, syntax.answer_opening, syntax.answer_closing}
        # Mistral's bodies contain further markers.
        if any(syntax.opening == "[TOOL_CALLS]" for syntax in self.calls):
            found |= {"[ARGS]", "[CALL_ID]"}
        return frozenset(found - {""})


_HERMES = CallSyntax(opening="<tool_call>", body="json", closing="</tool_call>")
_PIPED = CallSyntax(opening="<|tool_call|>", body="json", closing="<|/tool_call|>")
_CALLS: Mapping[str, tuple[CallSyntax, ...]] = {
    # Qwen 2.5, Qwen 3, Hermes and Granite 4 use this syntax.
    "hermes": (_HERMES,),
    "qwen3_coder": (CallSyntax(opening="<tool_call>", body="xml", closing="</tool_call>"),),
    "llama3": (
        CallSyntax(opening="<|python_tag|>", body="python_tag", separator=";"),
        CallSyntax(opening="", body="bare", separator=";", at_start=True),
    ),
    "mistral": (CallSyntax(opening="[TOOL_CALLS]", body="named_json"),),
    "phi4": (_PIPED, CallSyntax(opening="functools", body="json", at_start=True)),
    "granite": (_PIPED, _HERMES),
    "smollm3": (
        _HERMES,
        CallSyntax(opening="<code>", body="code", closing="</code>"),
    ),
    "gemma": (CallSyntax(opening="```tool_code\n", body="code", closing="```"),),
    "pythonic": (CallSyntax(opening="", body="call_list", at_start=True),),
}
_THINK = ReasoningSyntax(opening="<think>", closing="</think>")
_REASONING = (
    (
        "<response>",
        ReasoningSyntax(
            opening="<think>", closing="</think>", answer_opening="<response>", answer_closing="</response>"
        ),
    ),
    ("<think>", _THINK),
    ("</think>", _THINK),
    ("[THINK]", ReasoningSyntax(opening="[THINK]", closing="[/THINK]")),
    (
        "Here is my thought process:",
        ReasoningSyntax(opening="Here is my thought process:", closing="Here is my response:"),
    ),
)


def answer_format(template: str, name: str | None = None) -> AnswerFormat:
    """Return the format of a model's answers to prompts that a chat template renders.

    Args:
        template: the template's Jinja source.
        name: the model family, which determines the syntax of tool calls. "text" leaves answers unchanged. None detects
            the family from the template.

    Raises:
        PrecastError: the family is unknown.
    """
    if name == PLAIN:
        return AnswerFormat(name=PLAIN, reasoning=(), calls=())
    if name is not None and name not in _CALLS:
        raise PrecastError(
            f"answer_format: expected one of {', '.join((*sorted(_CALLS), PLAIN))}, found {name!r:.60}."
        )
    family = name or _family(template)
    reasoning = next((syntax for marker, syntax in _REASONING if marker in template), None)
    return AnswerFormat(
        name=family,
        reasoning=() if reasoning is None else (reasoning,),
        calls=_CALLS.get(family, ()),
    )


def _family(template: str) -> str:
    """Return the model family whose tool-call syntax a template prescribes, or "text" if no known family matches."""
    if "python_tools" in template and "<code>" in template:
        return "smollm3"
    if "<|tool_call|>" in template:
        return "phi4" if "<|tool|>" in template else "granite"
    if "<tool_call>" in template:
        # Other families use the same tags as Hermes, but write XML between them.
        if "<function=" in template:
            return "qwen3_coder"
        return PLAIN if "<arg_key>" in template else "hermes"
    markers = {
        "[TOOL_CALLS]": "mistral",
        "<|python_tag|>": "llama3",
        "<|start_header_id|>ipython": "llama3",
        "<|tool|>": "phi4",
        "functools[": "phi4",
        "```tool_code": "gemma",
        "func_name1(params_name1=": "pythonic",
    }
    return next((family for marker, family in markers.items() if marker in template), PLAIN)
