"""A GGUF file's tokenizer as a tokenizer.json.

transformers has a converter too (`transformers.integrations.gguf`), but as of 5.23 it gives every byte-level
vocabulary whose pre-tokenizer it does not list the one of GPT-2, "smollm" among them, without a word, and it
leaves out Qwen2's normaliser and Llama 3's `ignore_merges`. So the JSON is written here, as a table that can
be read.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from precast.loaders.artifact.errors import PrecastError

_PREFIX = "tokenizer.ggml."

# What this file reads, and what only says something about ids that the export does not use.
_KNOWN = frozenset(
    {
        "model",
        "pre",
        "tokens",
        "token_type",
        "scores",
        "merges",
        "add_bos_token",
        "add_eos_token",
        "add_space_prefix",
    }
)
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "add_sep_token": (False,),
    "remove_extra_whitespaces": (False,),
    "precompiled_charsmap": ([], ""),
    "token_type_count": (0, 1),
}


class TokenType(IntEnum):
    """What a token is for; the numbers are llama.cpp's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class _Pre:
    """A pre-tokenizer, which a byte-level GGUF file only names.

    Attributes:
        steps: how text is cut up, in the terms of tokenizer.json.
        normalizer: what is done to text before that, in the same terms.
        ignore_merges: whether a piece that is a token as a whole is taken as it is.
        add_bos: whether BOS is added where the file does not say.
    """

    steps: tuple[Mapping[str, object], ...]
    normalizer: Mapping[str, object] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


def _split(regex: str) -> Mapping[str, object]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> Mapping[str, object]:
    """Bytes to printable characters; `use_regex` cuts as GPT-2 does first."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _words_split(*, digits: str) -> Mapping[str, object]:
    """The cut of Llama 3 and Qwen2, which differ only in how many digits stay together."""
    contractions, letters = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
    others, spaces = r" ?[^\s\p{L}\p{N}]+[\r\n]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"
    return _split("|".join((contractions, letters, digits, others, spaces)))


_GPT2 = _Pre(steps=(_byte_level(use_regex=True),))
_SMOLLM = _Pre(steps=({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)))
_LLAMA3 = _Pre(
    steps=(_words_split(digits=r"\p{N}{1,3}"), _byte_level(use_regex=False)), ignore_merges=True, add_bos=True
)
_QWEN2 = _Pre(steps=(_words_split(digits=r"\p{N}"), _byte_level(use_regex=False)), normalizer={"type": "NFC"})
# What llama.cpp itself does under this name, one cut after the other; no published tokenizer is like it.
_DEFAULT = _Pre(
    steps=(
        _split(r"[\p{P}\$\+<=>\^~\|]+"),
        _split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
        _split(r"\p{N}+"),
        _split(r"[0-9][0-9][0-9]"),
        _byte_level(use_regex=False),
    )
)

# By `tokenizer.ggml.pre`. A name belongs here only when its whole published tokenizer.json is known.
_PRE_TOKENIZERS = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "smollm": _SMOLLM,
}


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """The metadata below ``tokenizer.ggml.``, its lists checked against each other."""

    path: Path
    metadata: Mapping[str, Any]
    tokens: list[str]
    types: list[int]

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{_PREFIX}{key}", default)

    def of(self, *types: TokenType) -> dict[str, int]:
        """The tokens of some types with their ids."""
        return {
            token: i
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in types
        }

    def error(self, sentence: str) -> PrecastError:
        return PrecastError(f"{self.path}: {sentence}")


def build_tokenizer(path: Path, metadata: Mapping[str, Any]) -> bytes:
    """The tokenizer.json of a GGUF file.

    Control tokens become special added tokens, user-defined ones added tokens that are not special; unused
    ones are left out. BOS and EOS are added as the metadata says, and where it says nothing, as llama.cpp
    does.

    Args:
        path: the file, for messages.
        metadata: all of its metadata.

    Raises:
        PrecastError: for a kind of tokenizer, a pre-tokenizer or a key that is not supported, and for lists
            that do not fit together.
    """
    vocabulary = _vocabulary(path, metadata)
    kind = vocabulary.get("model")
    if kind not in _BUILDERS:
        raise vocabulary.error(
            f"has a tokenizer of kind {kind}, and only {' and '.join(_BUILDERS)} are supported; use the "
            "model's Hugging Face checkpoint."
        )
    document = {"version": "1.0", "truncation": None, "padding": None, **_BUILDERS[kind](vocabulary)}
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    _check_loads(vocabulary, text)
    return text.encode("utf-8")


def _vocabulary(path: Path, metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens = metadata.get(f"{_PREFIX}tokens")
    if not isinstance(tokens, list) or not tokens:
        raise PrecastError(f"{path}: holds no vocabulary (tokenizer.ggml.tokens); convert the model again.")
    types = metadata.get(f"{_PREFIX}token_type") or [int(TokenType.NORMAL)] * len(tokens)
    vocabulary = _Vocabulary(path=path, metadata=metadata, tokens=tokens, types=types)
    if len(types) != len(tokens):
        raise vocabulary.error(
            f"has {len(tokens)} tokens but {len(types)} token types; convert the model again."
        )
    if unknown := sorted(set(types) - set(TokenType)):
        raise vocabulary.error(
            f"has tokens of type {unknown[0]}, which is not understood; convert the model again."
        )
    _refuse_unknown(vocabulary)
    used = [token for token, kind in zip(tokens, types, strict=True) if kind != TokenType.UNUSED]
    if len(set(used)) != len(used):
        twice = next(token for i, token in enumerate(used) if token in used[:i])
        raise vocabulary.error(f"has the token {twice!r} twice; convert the model again.")
    return vocabulary


def _refuse_unknown(vocabulary: _Vocabulary) -> None:
    for key, value in vocabulary.metadata.items():
        short = key.removeprefix(_PREFIX)
        if short == key or short in _KNOWN or short.endswith("_token_id") or value in _NEUTRAL.get(short, ()):
            continue
        raise vocabulary.error(
            f"has the metadata key {key}, which is not understood and may change how text becomes tokens; "
            "use the model's Hugging Face checkpoint."
        )


def _check_loads(vocabulary: _Vocabulary, text: str) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises no narrower one, as for a merge out of the vocabulary
        raise vocabulary.error(
            f"has a tokenizer that does not fit together ({error}); convert the model again."
        ) from error


# --- byte-level BPE (GPT-2 and its kin) ---------------------------------------------------------------------


def _byte_level_document(vocabulary: _Vocabulary) -> dict[str, object]:
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


def _pre_tokenizer(vocabulary: _Vocabulary) -> _Pre:
    name = vocabulary.get("pre")
    if name is None:
        raise vocabulary.error(
            "does not say how text is cut up before merging (tokenizer.ggml.pre), so it comes from an "
            "outdated converter; convert the model again."
        )
    if name not in _PRE_TOKENIZERS:
        raise vocabulary.error(
            f"has the pre-tokenizer {name} (tokenizer.ggml.pre), and only {', '.join(_PRE_TOKENIZERS)} are "
            "supported; use the model's Hugging Face checkpoint."
        )
    return _PRE_TOKENIZERS[name]


def _merge(vocabulary: _Vocabulary, merge: str) -> list[str]:
    pair = merge.split(" ")
    if len(pair) != 2 or not all(pair):
        raise vocabulary.error(f"has the merge {merge!r}, which is not two tokens; convert the model again.")
    return pair


# --- SentencePiece BPE (Llama 2 and its kin) ----------------------------------------------------------------


def _sentencepiece_document(vocabulary: _Vocabulary) -> dict[str, object]:
    """Like tokenizer.json of Llama 2: spaces become ▁, one goes in front, unknown characters become bytes."""
    if vocabulary.get("pre", "default") != "default":
        raise vocabulary.error(
            f"has the pre-tokenizer {vocabulary.get('pre')} (tokenizer.ggml.pre), which a SentencePiece "
            "tokenizer does not have; use the model's Hugging Face checkpoint."
        )
    prefix = vocabulary.get("add_space_prefix", True)
    in_front: list[object] = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    strip: list[object] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    unspaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "added_tokens": _added_tokens(vocabulary),
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
            unk_token=next(iter(vocabulary.of(TokenType.UNKNOWN)), None),
            byte_fallback=bool(vocabulary.of(TokenType.BYTE)),
        ),
    }


def _merges_of_scores(vocabulary: _Vocabulary) -> list[list[str]]:
    """Merges in the order in which SentencePiece would do them: highest score of the result first.

    SentencePiece joins whichever two neighbours make the piece of the highest score, so that each way of
    cutting a piece in two pieces is a merge.
    """
    scores = vocabulary.get("scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise vocabulary.error(
            "lacks one score for each token (tokenizer.ggml.scores), from which a SentencePiece tokenizer "
            "is made; convert the model again."
        )
    pieces = vocabulary.of(TokenType.NORMAL)
    found = [
        (-scores[number], -cut, piece[:cut], piece[cut:])
        for piece, number in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [[left, right] for _, _, left, right in sorted(found)]


# --- shared by both -----------------------------------------------------------------------------------------


def _bpe(
    vocabulary: _Vocabulary,
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
        "vocab": vocabulary.of(*used),
        "merges": _written(list(merges)),
    }


def _written(merges: list[list[str]]) -> list[str] | list[list[str]]:
    """Merges in the older spelling, "a b", where it says the same: it takes two thirds of the time to read.

    It cannot spell a space in a token, and takes what begins with "#version" for a comment.
    """
    if any(" " in token or token.startswith("#version") for pair in merges for token in pair):
        return merges
    return [" ".join(pair) for pair in merges]


def _added_tokens(vocabulary: _Vocabulary) -> list[dict[str, object]]:
    """The tokens that are found whole in the text, by id."""
    special = vocabulary.of(TokenType.CONTROL, TokenType.UNKNOWN)
    found = special | vocabulary.of(TokenType.USER_DEFINED)
    return [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token in special,
        }
        for token, number in sorted(found.items(), key=lambda item: item[1])
    ]


def _post_processor(vocabulary: _Vocabulary, *, add_bos: bool) -> dict[str, object] | None:
    """Adds BOS and EOS if the metadata says so; `add_bos` is what holds where it says nothing."""
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


def _special(vocabulary: _Vocabulary, which: str) -> tuple[str, int]:
    number = vocabulary.get(f"{which}_token_id")
    if not isinstance(number, int) or not 0 <= number < len(vocabulary.tokens):
        raise vocabulary.error(
            f"has the {which.upper()} token added to every text, but tokenizer.ggml.{which}_token_id names "
            f"no token ({number}); convert the model again."
        )
    return vocabulary.tokens[number], number


_BUILDERS = {"gpt2": _byte_level_document, "llama": _sentencepiece_document}
