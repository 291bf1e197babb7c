"""Build a tokenizer.json from the tokenizer in a GGUF file's metadata.

transformers has a converter too (`transformers.integrations.gguf`), but as of 5.23 it silently falls back to GPT-2's
pre-tokenizer for every pre-tokenizer that it does not know, such as "smollm". It also omits Qwen2's normalizer and
Llama 3's `ignore_merges`. This module therefore writes the JSON itself.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .pretokenizers import PRE_TOKENIZERS, PreTokenizer
from .vocabulary import TokenType, Vocabulary, read_vocabulary

_SPACE = "▁"  # SentencePiece writes a space in a piece in this way

# The special tokens of Phi 3 that keep the spaces and line ends after them; all others strip them.
_KEEP_SPACES = ("<unk>", "<s>", "<|endoftext|>")


def build_tokenizer(path: Path, metadata: Mapping[str, Any]) -> bytes:
    """Return the tokenizer.json of a GGUF file.

    Control and unknown tokens become special added tokens, user-defined tokens become added tokens, and unused tokens
    are left out. Two metadata keys state whether texts get a BOS and an EOS token. If a key is absent, llama.cpp's
    default applies.

    Args:
        path: the file, for messages.
        metadata: all metadata of the file.

    Raises:
        PrecastError: the kind of tokenizer, its pre-tokenizer or a key is not supported, or lists are inconsistent.
    """
    vocabulary = read_vocabulary(path, metadata)
    kind = vocabulary.get("model")
    if kind not in _BUILDERS:
        raise vocabulary.error(
            f"expected tokenizer.ggml.model to be {' or '.join(_BUILDERS)}, found {kind}; use the model's Hugging Face"
            " checkpoint."
        )
    document = {"version": "1.0", "truncation": None, "padding": None, **_BUILDERS[kind](vocabulary)}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    _check_loads(vocabulary, text)
    return text.encode("utf-8")


def _check_loads(vocabulary: Vocabulary, text: str) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises no narrower class
        raise vocabulary.error(
            f"has an inconsistent tokenizer ({error}); convert the model again."
        ) from error


# --- byte-level BPE (GPT-2 and its kin) ---------------------------------------------------------------------


def _byte_level_document(vocabulary: Vocabulary) -> dict[str, object]:
    pre = _pre_tokenizer(vocabulary)
    merges = vocabulary.get("merges")
    if not isinstance(merges, list):
        raise vocabulary.error("lacks the metadata key tokenizer.ggml.merges; convert the model again.")
    return {
        "added_tokens": _added_tokens(vocabulary),
        "normalizer": pre.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(pre.steps)},
        "post_processor": _post_processor(vocabulary, add_bos=pre.add_bos),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(
            vocabulary,
            [_merge(vocabulary, merge) for merge in merges],
            ignore_merges=pre.ignore_merges,
        ),
    }


def _pre_tokenizer(vocabulary: Vocabulary) -> PreTokenizer:
    name = vocabulary.get("pre")
    if name is None:
        raise vocabulary.error(
            "lacks the metadata key tokenizer.ggml.pre, which names the pre-tokenizer; convert the model again"
            " with a current converter."
        )
    if name not in PRE_TOKENIZERS:
        raise vocabulary.error(
            f"expected tokenizer.ggml.pre to be one of {', '.join(PRE_TOKENIZERS)}, found {name}; use the model's"
            " Hugging Face checkpoint."
        )
    return PRE_TOKENIZERS[name]


def _merge(vocabulary: Vocabulary, merge: str) -> list[str]:
    pair = merge.split(" ")
    if len(pair) != 2 or not all(pair):
        raise vocabulary.error(f"expected merges of two tokens, found {merge!r}; convert the model again.")
    return pair


# --- SentencePiece BPE (Llama 2 and its kin) ----------------------------------------------------------------


def _sentencepiece_document(vocabulary: Vocabulary) -> dict[str, object]:
    """Return a tokenizer.json like Llama 2's.

    The tokenizer prepends a ▁ to each text, turns spaces into ▁, and splits unknown characters into bytes.
    """
    if vocabulary.get("pre", "default") != "default":
        raise vocabulary.error(
            f"has the pre-tokenizer {vocabulary.get('pre')} (tokenizer.ggml.pre), which a SentencePiece "
            "tokenizer does not have; use the model's Hugging Face checkpoint."
        )
    if vocabulary.get("token_type") is None:
        raise vocabulary.error(
            "lacks the metadata key tokenizer.ggml.token_type, which tells bytes and control tokens from words;"
            " convert the model again with a current converter, or use the model's Hugging Face checkpoint."
        )
    vocabulary = _with_spaces(vocabulary)
    prefix = vocabulary.get("add_space_prefix", True)
    in_front: list[object] = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    strip: list[object] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    unspaces = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {
        "added_tokens": _added_tokens(vocabulary, stripping=_stripping(vocabulary)),
        "normalizer": {"type": "Sequence", "normalizers": [*in_front, spaces]},
        "pre_tokenizer": None,
        "post_processor": _post_processor(vocabulary, add_bos=True),
        "decoder": {
            "type": "Sequence",
            "decoders": [unspaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": _bpe(
            vocabulary,
            _merges_of_scores(vocabulary),
            unk_token=next(iter(vocabulary.of_types(TokenType.UNKNOWN)), None),
            byte_fallback=bool(vocabulary.of_types(TokenType.BYTE)),
        ),
    }


def _with_spaces(vocabulary: Vocabulary) -> Vocabulary:
    """Return the vocabulary with spaces in place of ▁ in user-defined tokens that consist of ▁ alone.

    Gemma has tokens for runs of spaces. The tokenizer searches the text for these tokens before it replaces spaces with
    ▁, so the tokens must contain spaces. Older converters wrote them with ▁.
    """
    pairs = zip(vocabulary.tokens, vocabulary.types, strict=True)
    tokens = [
        " " * len(token) if kind == TokenType.USER_DEFINED and not token.strip(_SPACE) else token
        for token, kind in pairs
    ]
    found = replace(vocabulary, tokens=tokens).of_types(TokenType.USER_DEFINED)
    if len(found) != vocabulary.types.count(TokenType.USER_DEFINED):
        raise vocabulary.error(
            "has two tokens for the same run of spaces, one of spaces and one of ▁; convert the model again."
        )
    return replace(vocabulary, tokens=tokens)


def _stripping(vocabulary: Vocabulary) -> frozenset[str]:
    """Return the tokens that strip spaces and line ends after them.

    Phi 3's tokenizer.json marks these tokens, but its GGUF files do not. The architecture "phi3" therefore implies
    them, as in llama.cpp.
    """
    if vocabulary.metadata.get("general.architecture") != "phi3":
        return frozenset()
    found = vocabulary.of_types(TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    return frozenset(found).difference(_KEEP_SPACES)


def _merges_of_scores(vocabulary: Vocabulary) -> list[list[str]]:
    """Return the merges that are equivalent to the scores of SentencePiece, in descending order of score.

    SentencePiece repeatedly joins the two neighbours that form the piece with the highest score. Every split of a piece
    into two pieces is therefore a merge, and its score is that of the whole piece. Merges of equal score are in the
    order of transformers' converter.
    """
    scores = vocabulary.get("scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise vocabulary.error(
            "lacks a score for each token (tokenizer.ggml.scores), without which its merges are unknown; convert the"
            " model again."
        )
    pieces = vocabulary.of_types(TokenType.NORMAL)
    _refuse_unused(vocabulary, pieces)
    found = [
        (-scores[number], -len(left), -len(right), number, left, right)
        for piece, number in pieces.items()
        for left, right in _splits(piece, pieces)
    ]
    if len({number for *_, number, _, _ in found}) > 1 and len({score for score, *_ in found}) == 1:
        raise vocabulary.error(
            "gives every piece the same score (tokenizer.ggml.scores), so the order in which they are joined is"
            " unknown; use the model's Hugging Face checkpoint."
        )
    return [[left, right] for *_, left, right in sorted(found)]


def _splits(piece: str, pieces: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield every pair of pieces in `pieces` whose concatenation is `piece`."""
    for cut in range(1, len(piece)):
        if piece[:cut] in pieces and piece[cut:] in pieces:
            yield piece[:cut], piece[cut:]


def _refuse_unused(vocabulary: Vocabulary, pieces: Mapping[str, int]) -> None:
    """Refuse a vocabulary with an unused piece that is the concatenation of two other pieces.

    SentencePiece joins the two pieces, and later splits the unused result again. BPE merges cannot express that.
    """
    unused = vocabulary.of_types(TokenType.UNUSED)
    everything = {**pieces, **unused}
    for piece in unused:
        if any(True for _ in _splits(piece, everything)):
            raise vocabulary.error(
                f"has the unused token {piece!r}, which SentencePiece forms from other tokens, but BPE merges"
                " cannot express that; use the model's Hugging Face checkpoint."
            )


# --- both kinds ---------------------------------------------------------------------------------------------


def _bpe(
    vocabulary: Vocabulary,
    merges: Iterable[list[str]],
    *,
    unk_token: str | None = None,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, object]:
    used = [kind for kind in TokenType if kind != TokenType.UNUSED]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unk_token is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocabulary.of_types(*used),
        "merges": list(merges),
    }


def _added_tokens(
    vocabulary: Vocabulary, *, stripping: frozenset[str] = frozenset()
) -> list[dict[str, object]]:
    """Return the tokens that are matched whole in the text, in the order of their ids."""
    special = vocabulary.of_types(TokenType.CONTROL, TokenType.UNKNOWN)
    found = special | vocabulary.of_types(TokenType.USER_DEFINED)
    return [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": token in stripping,
            "normalized": False,
            "special": token in special,
        }
        for token, number in sorted(found.items(), key=lambda item: item[1])
    ]


def _post_processor(vocabulary: Vocabulary, *, add_bos: bool) -> dict[str, object] | None:
    """Return the step that adds BOS and EOS to texts, or None; `add_bos` is the default of ``add_bos_token``."""
    before = [_special(vocabulary, "bos")] if vocabulary.get("add_bos_token", add_bos) else []
    after = [_special(vocabulary, "eos")] if vocabulary.get("add_eos_token", False) else []
    if not before and not after:
        return None
    named = {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in before + after}

    def sequence(letter: str, type_id: int) -> list[object]:
        leading, trailing = (
            [{"SpecialToken": {"id": token, "type_id": type_id}} for token, _ in side]
            for side in (before, after)
        )
        return [*leading, {"Sequence": {"id": letter, "type_id": type_id}}, *trailing]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": named,
    }


def _special(vocabulary: Vocabulary, which: str) -> tuple[str, int]:
    number = vocabulary.get(f"{which}_token_id")
    if not isinstance(number, int) or not 0 <= number < len(vocabulary.tokens):
        raise vocabulary.error(
            f"adds the {which.upper()} token to every text, but tokenizer.ggml.{which}_token_id names "
            f"no token ({number}); convert the model again."
        )
    return vocabulary.tokens[number], number


_BUILDERS = {"gpt2": _byte_level_document, "llama": _sentencepiece_document}
