"""Pre-tokenizers of byte-level vocabularies, by name. A GGUF file has only the name of its pre-tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """The steps of a tokenizer before BPE merging.

    Attributes:
        steps: the pre-tokenizers, in the form of tokenizer.json.
        normalizer: the normalizer in the form of tokenizer.json, or None.
        ignore_merges: True if a piece that is itself a token becomes that token without BPE merging.
        add_bos: True if texts get a BOS token; overridden by the metadata key ``add_bos_token``.
    """

    steps: tuple[Mapping[str, object], ...]
    normalizer: Mapping[str, object] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


def _split(regex: str) -> Mapping[str, object]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> Mapping[str, object]:
    """Return a step that maps bytes to printable characters. With `use_regex`, it first splits the text like GPT-2."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_NFC = {"type": "NFC"}
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _words(*, digits: str) -> tuple[Mapping[str, object], ...]:
    """Return steps that split as cl100k, Llama 3 and Qwen2 do.

    These tokenizers differ only in `digits`, the pattern of a piece of digits.
    """
    letters, others = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    return _split("|".join((_ENDINGS, letters, digits, others, _SPACES))), _byte_level(use_regex=False)


def _cased_words(*, digits: str, endings: str) -> tuple[Mapping[str, object], ...]:
    """Return steps that split as o200k and Tekken do: a word also ends before a capital letter."""
    start, upper, lower = (
        r"[^\r\n\p{L}\p{N}]?",
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
    )
    words = f"{start}{upper}*{lower}+{endings}|{start}{upper}+{lower}*{endings}"
    others = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
    return _split("|".join((words, digits, others, _SPACES))), _byte_level(use_regex=False)


_GPT2 = PreTokenizer(steps=(_byte_level(use_regex=True),))
_GPT_NEOX = PreTokenizer(steps=_GPT2.steps, normalizer=_NFC)
_DIGITS_ALONE = PreTokenizer(
    steps=({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True))
)
_CL100K = PreTokenizer(steps=_words(digits=r"\p{N}{1,3}"))
_LLAMA3 = PreTokenizer(steps=_CL100K.steps, ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer(steps=_words(digits=r"\p{N}"), normalizer=_NFC)
_O200K = PreTokenizer(steps=_cased_words(digits=r"\p{N}{1,3}", endings=f"{_ENDINGS}?"))
_TEKKEN = PreTokenizer(steps=_cased_words(digits=r"\p{N}", endings=""), ignore_merges=True, add_bos=True)
_FALCON = PreTokenizer(
    steps=(
        {"type": "Punctuation", "behavior": "Contiguous"},
        _byte_level(use_regex=True),
        {"type": "Digits", "individual_digits": False},
        _split(r"[0-9][0-9][0-9]"),
    )
)
# The splits that llama.cpp makes, one after another, for the name "default". No published tokenizer.json has these.
_DEFAULT = PreTokenizer(
    steps=(
        _split(r"[\p{P}\$\+<=>\^~\|]+"),
        _split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
        _split(r"\p{N}+"),
        _split(r"[0-9][0-9][0-9]"),
        _byte_level(use_regex=False),
    )
)

# By `tokenizer.ggml.pre`. Except for "default", a name belongs here only if a published tokenizer.json defines it.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": _DEFAULT,
    "gpt-2": _GPT2,
    "gpt2": _GPT2,
    "phi-2": _GPT2,
    "olmo": _GPT_NEOX,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "dbrx": _CL100K,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "smollm": _DIGITS_ALONE,
    "starcoder": _DIGITS_ALONE,
    "refact": _DIGITS_ALONE,
    "falcon": _FALCON,
    "tekken": _TEKKEN,
    "gpt-4o": _O200K,
    "llama4": _O200K,
}
