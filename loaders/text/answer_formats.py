"""The forms of tool calls and of reasoning in answers, for each family of models.

A chat template prescribes the forms, so the template's text identifies the family. llama.cpp and vLLM support the same
forms.
"""

from collections.abc import Mapping

from ..artifact.errors import PrecastError
from ..artifact.frozen import Frozen

# The name of the format that leaves answers unchanged.
PLAIN = "text"


class CallSyntax(Frozen):
    """A form of tool calls. A body holds the text of one or more calls, usually between two markers.

    Attributes:
        opening: the marker before a body; empty for bodies without markers.
        body: the kind of body, a key of `tool_calls.BODIES`.
        closing: the marker after a body, which models may omit; empty if the form has none.
        separator: text between two bodies without markers.
        at_start: True if calls occur only at the start of an answer. Then a call counts only if the model was
            given the tool, because an ordinary answer may look like a call.
    """

    opening: str
    body: str
    closing: str = ""
    separator: str = ""
    at_start: bool = False


class ReasoningSyntax(Frozen):
    """A form of reasoning, at the start of an answer.

    Attributes:
        opening: the marker before the reasoning.
        closing: the marker after the reasoning.
        answer_opening: the marker before the answer, which models may omit; empty if the form has none.
        answer_closing: the marker after the answer; empty if the form has none.
    """

    opening: str
    closing: str
    answer_opening: str = ""
    answer_closing: str = ""


class AnswerFormat(Frozen):
    """The form of an answer.

    Attributes:
        name: the family's name.
        reasoning: forms of reasoning; the first whose marker begins the answer applies.
        calls: forms of tool calls.
    """

    name: str
    reasoning: tuple[ReasoningSyntax, ...]
    calls: tuple[CallSyntax, ...]

    def markers(self) -> frozenset[str]:
        """Return the markers, which may be special tokens."""
        found = {text for syntax in self.calls for text in (syntax.opening, syntax.closing)}
        for syntax in self.reasoning:
            found |= {syntax.opening, syntax.closing, syntax.answer_opening, syntax.answer_closing}
        # Mistral's bodies have markers inside.
        if any(syntax.opening == "[TOOL_CALLS]" for syntax in self.calls):
            found |= {"[ARGS]", "[CALL_ID]"}
        return frozenset(found - {""})


_HERMES = CallSyntax(opening="<tool_call>", body="json", closing="</tool_call>")
_PIPED = CallSyntax(opening="<|tool_call|>", body="json", closing="<|/tool_call|>")
_CALLS: Mapping[str, tuple[CallSyntax, ...]] = {
    # The form of Qwen 2.5 and 3, Hermes and Granite 4.
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
    """Return the format in which a model answers prompts made with this chat template.

    Args:
        template: the template's Jinja source.
        name: the model family whose syntax of tool calls to expect; "text" leaves answers unchanged, and None lets
            the template decide.

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
    """Return the family whose tool calls a template prescribes, or "text"."""
    if "python_tools" in template and "<code>" in template:
        return "smollm3"
    if "<|tool_call|>" in template:
        return "phi4" if "<|tool|>" in template else "granite"
    if "<tool_call>" in template:
        # Other families put XML between the tags that Hermes uses.
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
