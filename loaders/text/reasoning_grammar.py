"""The grammar of the reasoning before a constrained answer, in llguidance's variant of Lark's syntax."""

from typing import TYPE_CHECKING

from .vocabulary_bytes import grammar_symbol, mark_token

if TYPE_CHECKING:
    from .answer_formats import ReasoningSyntax
    from .tokenizer import Tokenizer

# Line ends between the reasoning and the answer, which the parser of answers removes.
_GAP = r"GAP: /\n{1,4}/"


def reasoning_grammar(
    syntax: "ReasoningSyntax", prompt: str, tokenizer: "Tokenizer", *, is_open: bool
) -> str:
    """Return the rule ``reasoned`` of an answer after its reasoning; empty if the prompt allows no reasoning.

    The rule refers to the rules ``answer``, which is the answer itself, and ``space``, for a space before the text.
    If the prompt has opened the reasoning, the answer must close it. Otherwise a model may reason if it has a token for
    the marker, or the prompt mentions the marker. A prompt that ends with closed reasoning allows no more of it; with
    such a prompt, templates turn reasoning off.

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
