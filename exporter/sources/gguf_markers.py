"""Chat markers that a GGUF file has as ordinary text.

Converters often give `<|im_end|>` and its kin the type of a word, so that a prompt is cut into letters where the model
knows one token. llama.cpp overrules the type of tokens that end a text or a turn, by their spelling; the markers of the
file's own chat templates are mended here as well.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_TEMPLATE = "tokenizer.chat_template"

# Tokens that are never a word, whatever a file says: ends of texts and turns, and what frames a turn.
_KNOWN = frozenset(
    """
    <|begin_of_text|> <|end_of_text|> <|endoftext|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|>
    <|im_start|> <|im_end|> <|end|> <|return|> <|call|> <|start_of_role|> <|end_of_role|> <start_of_turn> <end_of_turn>
    <end_of_utterance> <EOT> _<EOT> [EOT] [EOS] <｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>
    """.split()
)
# How markers are spelt; a token of such a spelling that a chat template writes is one.
_SPELLING = re.compile(r"<[|｜][^\s<>]+[|｜]>|</?[a-z]+_of_[a-z]+>|</?s>|\[/?[A-Z_]+\]")

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def mistyped(tokens: Sequence[str], types: Sequence[int], metadata: Mapping[str, Any]) -> list[int]:
    """The ids of markers whose type is that of a word.

    Args:
        tokens: the text of each token, by id.
        types: what each is for, by llama.cpp's numbers.
        metadata: all of the file's metadata, with its chat templates.
    """
    written = _written(
        value for key, value in metadata.items() if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}.")
    )
    return [
        number
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if (token in _KNOWN and kind in (_NORMAL, _USER_DEFINED)) or (token in written and kind == _NORMAL)
    ]


def _written(templates: Iterable[object]) -> frozenset[str]:
    """The markers in the text of templates."""
    return frozenset(
        marker
        for template in templates
        if isinstance(template, str)
        for marker in _SPELLING.findall(template)
    )


def mended(tokens: Sequence[str], types: Sequence[int], metadata: Mapping[str, Any]) -> list[int]:
    """The types of tokens, those of markers mended; arguments as `mistyped`."""
    wrong = frozenset(mistyped(tokens, types, metadata))
    return [_CONTROL if number in wrong else kind for number, kind in enumerate(types)]


def marker_remarks(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """A line that names the mended markers, where there are any; arguments as `mistyped`."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type")
    if not types or not (wrong := mistyped(tokens, types, metadata)):
        return ()
    named = ", ".join(tokens[number] for number in wrong[:5])
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return (
        f"the GGUF file has chat markers typed as words: {named}{more}; each is taken for one control token",
    )
