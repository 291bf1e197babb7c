"""The grammar of the reasoning before a constrained answer, in llguidance's variant of Lark's syntax."""

from typing import TYPE_CHECKING

from .vocabulary_bytes import grammar_symbol, mark_token

if TYPE_CHECKING:
    from .answer_formats import ReasoningSyntax
    from .tokenizer import Tokenizer

# Newlines between the reasoning and the answer. The answer parser removes them.
_GAP = r"GAP: /\n{1,4}/"


def reasoning_grammar(
    syntax: "ReasoningSyntax", prompt: str, tokenizer: "Tokenizer", *, is_open: bool
) -> str:
    """Return the rule ``reasoned``, which matches reasoning and then the answer; "" if reasoning is not allowed.

    The caller must define two rules that the result refers to: ``answer`` matches the answer, and ``space`` matches the
    spaces before it.

    If the prompt has opened the reasoning, the model must close it. Otherwise the model may reason if its vocabulary
    has a token for the opening marker, or if the prompt contains that marker. If the prompt ends with the closing
    marker, the model must not reason, because templates end a prompt in this way to turn reasoning off.

    Args:
        syntax: the form of the reasoning.
        prompt: the prompt's text, with special tokens.
        tokenizer: the model's tokenizer.
        is_open: True if the prompt has opened the reasoning.
    """
    if prompt.rstrip().endswith(syntax.closing):
        return ""
    if not (is_open or syntax.opening in prompt or mark_token(tokenizer, syntax.opening) is not None):
        return ""
    opening = "" if is_open else grammar_symbol(tokenizer, syntax.opening)
    if opening.startswith('"'):
        opening = f"space {opening}"
    if mark_token(tokenizer, syntax.closing) is None:
        thought = "thought"
        rule = f"thought[suffix={grammar_symbol(tokenizer, syntax.closing)}]: /(.|\\n)*/"
    else:
        thought = f"THOUGHT? {grammar_symbol(tokenizer, syntax.closing)}"
        rule = r"THOUGHT: /(.|\n)+/"
    answer = "answer"
    if syntax.answer_opening:
        before, after = (
            grammar_symbol(tokenizer, text) for text in (syntax.answer_opening, syntax.answer_closing)
        )
        answer = f"{before} answer {after}"
    optional = "" if is_open else " | space answer"
    return "\n".join((f"reasoned: {opening} {thought} GAP? {answer}{optional}", rule, _GAP))
