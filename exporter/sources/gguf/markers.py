"""Repair the token types of chat markers that a GGUF file declares as ordinary words.

Converters often declare `<|im_end|>` and similar markers as words. The tokenizer would then split a marker that is a
single token for the model. llama.cpp has a list of markers that end a text or a turn, and overrides their types.
This module does the same, and also repairs markers that occur in the file's own chat templates.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_TEMPLATE = "tokenizer.chat_template"

# Tokens that are never words, whatever type the file declares. They begin or end a text, a turn or a turn's header.
_KNOWN = frozenset(
    """
    <|begin_of_text|> <|end_of_text|> <|endoftext|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|>
    <|im_start|> <|im_end|> <|end|> <|return|> <|call|> <|start_of_role|> <|end_of_role|> <start_of_turn> <end_of_turn>
    <end_of_utterance> <EOT> _<EOT> [EOT] [EOS] <｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>
    """.split()
)
# The forms of chat markers. Any text of such a form counts as a marker if it occurs in a chat template.
_SPELLING = re.compile(r"<[|｜][^\s<>]+[|｜]>|</?[a-z]+_of_[a-z]+>|</?s>|\[/?[A-Z_]+\]")

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def mistyped_markers(tokens: Sequence[str], types: Sequence[int], metadata: Mapping[str, Any]) -> list[int]:
    """Return the ids of chat markers with a wrong type: normal or, for markers in `_KNOWN`, user-defined.

    Args:
        tokens: the text of each token, by id.
        types: llama.cpp's type number of each token.
        metadata: all metadata of the file, including its chat templates.
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
    """Return the chat markers that occur in the file's chat templates."""
    return frozenset(
        marker
        for template in templates
        if isinstance(template, str)
        for marker in _SPELLING.findall(template)
    )


def repaired_types(tokens: Sequence[str], types: Sequence[int], metadata: Mapping[str, Any]) -> list[int]:
    """Return the types of all tokens, corrected for chat markers; the arguments are those of `mistyped_markers`."""
    wrong = frozenset(mistyped_markers(tokens, types, metadata))
    return [_CONTROL if number in wrong else kind for number, kind in enumerate(types)]


def marker_remarks(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one remark that names the repaired markers, or none if no marker was repaired."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type")
    if not types or not (wrong := mistyped_markers(tokens, types, metadata)):
        return ()
    named = ", ".join(tokens[number] for number in wrong[:5])
    more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
    return (f"the GGUF file declares chat markers as words: {named}{more}; each becomes one control token",)
