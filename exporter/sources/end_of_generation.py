"""Search a vocabulary for the tokens that end a generation.

Model files seldom name all of these tokens. The export recognises them by their texts, so a model stops at the same
tokens whether it comes from a GGUF file or a Hugging Face directory. The list of texts is llama.cpp's
(`special_eog_ids` in src/llama-vocab.cpp); transformers knows only the ids that a config names.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from precast.loaders.artifact.errors import PrecastError

# No vocabulary contains these texts by chance, so a token with such a text ends a generation, special or not.
_UNMISTAKABLE = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",  # gpt-oss
        "<|call|>",
        "<|calls|>",  # Solar Open
        "<|flush|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",  # DeepSeek
        "<turn|>",  # Gemma 4
        "<|tool_response>",
        "<|fim_pad|>",
        "<|fim_repo|>",
        "<|repo_name|>",
        "<|file_sep|>",
    }
)
# These texts also occur as ordinary words, so a token with such a text ends a generation only if it is special.
_IF_SPECIAL = frozenset(
    {
        "</s>",
        "<eos>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "[e~[",
        "<fim-pad>",
        "<PAD>",
        "<fim-repo>",
        "<REPO>",
    }
)
# Pairs of a token and a set of tokens. If the vocabulary has the whole set, the token does not end a generation.
_EXCEPTIONS: tuple[tuple[str, frozenset[str]], ...] = (
    ("<|end|>", frozenset({"<|return|>", "<|call|>"})),  # <|end|> only separates the messages of an answer
    ("<|end|>", frozenset({"<|flush|>", "<|calls|>"})),
    ("<|end|>", frozenset({"<|flush|>", "<|call|>"})),
    ("</s>", frozenset({"<|tool_response>"})),
)


def end_tokens_by_text(special: Mapping[str, int], plain: Mapping[str, int]) -> tuple[int, ...]:
    """Return the ids of the tokens whose text shows that they end a generation, in ascending order.

    Args:
        special: ids of the special tokens, by text. A tokenizer always matches them whole.
        plain: ids of all other tokens, by text.
    """
    found = {text: i for text, i in plain.items() if text in _UNMISTAKABLE}
    found |= {text: i for text, i in special.items() if text in _UNMISTAKABLE | _IF_SPECIAL}
    for text, others in _EXCEPTIONS:
        if others <= found.keys():
            found.pop(text, None)
    return tuple(sorted(found.values()))


def named_end_tokens(folder: Path, config: Mapping[str, object]) -> tuple[int, ...]:
    """Return the ids in `eos_token_id` of config.json or generation_config.json: none, one or several.

    Raises:
        PrecastError: `eos_token_id` is neither an id nor a list of ids.
    """
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise PrecastError(
            f"{folder}: expected eos_token_id to be a token id or a list of token ids, found {value!r:.80}; correct it."
        )
    return tuple(ids)


def merge_end_tokens(named: Iterable[int | None], by_text: Iterable[int]) -> tuple[int, ...]:
    """Return all end tokens without duplicates, starting with those listed in the model's files."""
    return tuple(dict.fromkeys(token for token in (*named, *by_text) if token is not None))
