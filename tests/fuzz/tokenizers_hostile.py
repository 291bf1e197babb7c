"""Hostile tokenizers: another model, another decoder, a catastrophic pattern, or an absurd vocabulary."""

import copy
from random import Random
from typing import Any

_PATTERNS = (
    "(a+)+$",
    "(a|a)*b",
    "(.*)*x",
    "a{1,99999}",
    "(?<=a+)b",
    "[",
    "(",
    "\\p{X}",
    "",
    "(?:a|aa)+$",
    "\\1",
    "(a*)*\\1",
    ".",
    "(?R)",
    "\\0",
)
_IDS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**63, -1, 10**6)


def _unigram(tree: Any, random: Random, pattern: dict[str, str]) -> None:
    tree["model"] = {
        "type": "Unigram",
        "unk_id": random.choice((None, 0, 1, 2**40)),
        "vocab": [["a", 0.0], ["<0x-1>", -1e308], ["", 1e308]] * random.choice((1, 50)),
        "byte_fallback": random.random() < 0.5,
    }


def _wordpiece(tree: Any, random: Random, pattern: dict[str, str]) -> None:
    tree["model"] = {
        "type": "WordPiece",
        "unk_token": random.choice(("[UNK]", "a")),
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": random.choice((0, 100, 2**63)),
        "vocab": {"a": 0, "##b": random.choice(_IDS)},
    }


def _vocabulary(tree: Any, random: Random, pattern: dict[str, str]) -> None:
    tree["model"]["vocab"] = {
        f"t{i}": i * random.choice((1, 1000)) for i in range(random.choice((0, 1, 5000)))
    } | {"<0x-1>": random.choice(_IDS)}


def _pretokenizer(tree: Any, random: Random, pattern: dict[str, str]) -> None:
    tree["pre_tokenizer"] = {
        "type": "Split",
        "pattern": pattern,
        "behavior": random.choice(("Isolated", "Removed", "MergedWithNext")),
        "invert": random.random() < 0.5,
    }


def _normalizer(tree: Any, random: Random, pattern: dict[str, str]) -> None:
    tree["normalizer"] = random.choice(
        (
            {"type": "Replace", "pattern": pattern, "content": "x" * random.choice((0, 1, 5000))},
            {
                "type": "Precompiled",
                "precompiled_charsmap": random.choice(("", "AAAA", "/////w==", "A" * 400)),
            },
            {"type": "Prepend", "prepend": "a" * 10_000},
            {
                "type": "Sequence",
                "normalizers": [{"type": random.choice(("NFKD", "Nmt", "Lowercase", "StripAccents"))}] * 20,
            },
        )
    )


def _decoder(tree: Any, random: Random, pattern: dict[str, str]) -> None:
    tree["decoder"] = random.choice(
        (
            {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            {"type": "Replace", "pattern": pattern, "content": "x"},
            {"type": "Strip", "content": "a", "start": random.choice((0, 2**63)), "stop": 5},
            {"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": True},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            None,
            {"type": "Sequence", "decoders": []},
        )
    )
    tree["model"]["vocab"] |= {f"<0x{i:02X}>": 300 + i for i in range(256)}


def _added_tokens(tree: Any, random: Random, pattern: dict[str, str]) -> None:
    flags = {
        key: random.random() < 0.5 for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
    }
    tree["added_tokens"] = [
        {
            "id": random.choice((*_IDS, 300 + i)),
            "content": random.choice(("a", "", "\0", "<s>", "x" * 9999, "é")),
            **flags,
        }
        for i in range(random.choice((1, 3, 300)))
    ]


def _post_processor(tree: Any, random: Random, pattern: dict[str, str]) -> None:
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * random.choice((1, 5000))
        + [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {
            "<s>": {
                "id": "<s>",
                "ids": [random.choice((0, 2**32 - 1))] * random.choice((0, 1, 1000)),
                "tokens": ["<s>"],
            }
        },
    }


def _padding(tree: Any, random: Random, pattern: dict[str, str]) -> None:
    tree["truncation"] = {
        "direction": "Right",
        "max_length": random.choice((0, 1, 2**63)),
        "strategy": "LongestFirst",
        "stride": random.choice((0, 5, 2**63)),
    }
    tree["padding"] = {
        "strategy": {"Fixed": random.choice((10, 2**31, 2**60))},
        "direction": "Right",
        "pad_to_multiple_of": random.choice((None, 0, 2**62)),
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }


_CHANGES = (
    _unigram,
    _wordpiece,
    _vocabulary,
    _pretokenizer,
    _normalizer,
    _decoder,
    _added_tokens,
    _post_processor,
    _padding,
)


def hostile_tokenizer(tree: Any, random: Random) -> Any:
    """Return a copy of a tokenizer with one hostile part."""
    tree = copy.deepcopy(tree)
    pattern = random.choice(({"Regex": random.choice(_PATTERNS)}, {"String": random.choice(("", "a", "\0"))}))
    _CHANGES[random.randrange(len(_CHANGES))](tree, random, pattern)
    return tree
