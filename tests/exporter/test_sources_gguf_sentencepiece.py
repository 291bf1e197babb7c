"""SentencePiece tokenizers of GGUF files compared with those that transformers builds from the same pieces."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from precast.exporter.sources.gguf.tokenizer import build_tokenizer
from precast.loaders.artifact.errors import PrecastError

HERE = Path("tiny.gguf")
ALPHABET = "▁abcht.1\né日👍\u0301"
TEXTS = st.lists(
    st.sampled_from(
        [*ALPHABET.replace("▁", " "), "  ", "   ", "\n\n", "\t", "abc", " the", "👩‍👧", "ß", "\x00"]
    ),
    max_size=40,
).map("".join)
OFF_THE_ROAD = [
    "",
    " ",
    "    ",
    "\n",
    " a  b   c ",
    "the  the\tthe\r\n the",
    "naïve café — e\u0301 vs é, Å, ﬁ, \u1e9b\u0323",
    "日本語テキスト 한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 \u200d\u200b\ufeff",
    "\u00a0\u2003\u2028\x1c\x0b\x00\x7f",
    "literal ▁ and ▁▁ and <0x0A> and <unk",
]


def metadata_of(pieces: list[str], scores: list[float], **keys: Any) -> dict[str, Any]:
    """Return a vocabulary of <unk>, <s>, </s>, the bytes and some pieces."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    metadata = {
        "model": "llama",
        "pre": "default",
        "tokens": ["<unk>", "<s>", "</s>", *bytes_, *pieces],
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "scores": [0.0] * 259 + scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | keys).items()}


def random_vocabulary(seed: int, **keys: Any) -> dict[str, Any]:
    """Return pieces that can be joined to form other pieces, some in several ways, with decreasing scores."""
    generator = random.Random(seed)
    pieces = list(ALPHABET)
    while len(pieces) < 70:
        piece = generator.choice(pieces) + generator.choice(pieces)
        if piece not in pieces and len(piece) < 9 and "\n\n\n" not in piece:
            pieces.append(piece)
    joined, letters = pieces[len(ALPHABET) :], pieces[: len(ALPHABET)]
    scores = [-float(i) for i in range(len(joined) + len(letters))]
    return metadata_of([*joined, *letters], scores, **keys)


def built(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(build_tokenizer(HERE, metadata).decode())


def refusal(metadata: dict[str, Any]) -> str:
    with pytest.raises(PrecastError) as caught:
        build_tokenizer(HERE, metadata)
    return str(caught.value)


def transformers_builds(builder: str, metadata: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that a builder of transformers makes from the same metadata."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    asked = {key: metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type")}
    tokenizer: Tokenizer = getattr(mapping, builder)(asked).backend_tokenizer
    return tokenizer


def assert_same(
    ours: Tokenizer, theirs: Tokenizer, texts: st.SearchStrategy[str], fits: Callable[[str], bool]
) -> None:
    def compare(text: str) -> None:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids)

    for text in filter(fits, OFF_THE_ROAD):
        compare(text)

    @settings(deadline=None, max_examples=150)
    @given(texts.filter(fits))
    def check(text: str) -> None:
        compare(text)

    check()


# --- Llama ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_tokenizer_of_llama_2(seed):
    """The published tokenizer.json prepends a space to every text, even if it begins with one."""
    metadata = random_vocabulary(seed)
    ours, theirs = built(metadata), transformers_builds("phi3_tokenizer", metadata)
    assert_same(ours, theirs, TEXTS, lambda text: True)


@pytest.mark.parametrize("seed", range(4))
def test_the_class_of_transformers(seed):
    """Unlike llama.cpp and SentencePiece, LlamaTokenizer prepends no space to a text that begins with one.

    All other texts give the same tokens.
    """
    metadata = random_vocabulary(seed)
    ours, theirs = built(metadata), transformers_builds("sentencepiece_tokenizer", metadata)
    assert_same(ours, theirs, TEXTS, lambda text: not text.startswith((" ", "▁")))
    assert (
        ours.encode(" a", add_special_tokens=False).ids != theirs.encode(" a", add_special_tokens=False).ids
    )


@pytest.mark.parametrize("seed", range(3))
def test_equal_scores_are_in_the_order_of_transformers(seed):
    metadata = random_vocabulary(seed)
    scores = metadata["tokenizer.ggml.scores"]
    metadata["tokenizer.ggml.scores"] = [-float(-score // 4) for score in scores]
    ours, theirs = built(metadata), transformers_builds("phi3_tokenizer", metadata)
    assert_same(ours, theirs, TEXTS, lambda text: True)


def plainly(metadata: dict[str, Any], text: str) -> list[int]:
    """Apply SentencePiece's rule: join the neighbours with the highest score, from the left if equal."""
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    symbols = list(("▁" + text if text else text).replace(" ", "▁"))
    while joined := [
        (-scores[ids[a + b]], i)
        for i, (a, b) in enumerate(itertools.pairwise(symbols))
        if ids.get(a + b, 0) >= 259
    ]:
        at = min(joined)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    found = ([ids[s]] if ids.get(s, 0) >= 259 else [byte + 3 for byte in s.encode()] for s in symbols)
    return [i for part in found for i in part]


@pytest.mark.parametrize("seed", range(4))
def test_merges_follow_the_rule_of_sentencepiece(seed):
    metadata = random_vocabulary(seed)
    ours = built(metadata)

    @settings(deadline=None, max_examples=150)
    @given(TEXTS)
    def check(text):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == plainly(metadata, text)
        assert ours.decode(ids) == text

    check()


def test_without_byte_tokens_unknown_characters_are_the_unknown_token():
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "▁a", "▁", "a", "b"],
        "tokenizer.ggml.token_type": [2, 1, 1, 1, 1],
        "tokenizer.ggml.scores": [0.0, 0.0, -1.0, -2.0, -3.0],
        "tokenizer.ggml.add_bos_token": False,
    }
    ours = built(metadata)
    assert ours.encode("a日本b").tokens == ["▁a", "<unk>", "b"]


def test_vocabularies_that_cannot_be_converted():
    pieces = ["▁a", "▁", "a", "aa"]
    same = metadata_of(pieces, [-1000.0] * 4)
    assert (
        "gives every piece the same score (tokenizer.ggml.scores), so the order in which they are joined is unknown"
        in (refusal(same))
    )
    built(metadata_of(["▁a", "▁", "a"], [-1000.0] * 3))  # the order of a single merge does not matter
    unused = metadata_of(pieces, [0.0, -2.0, -3.0, -1.0], token_type=[2, 3, 3] + [6] * 256 + [1, 1, 1, 5])
    assert "has the unused token 'aa', which SentencePiece forms from other tokens" in refusal(unused)
    padded = metadata_of(
        [*pieces[:3], "[PAD0]"], [0.0, -2.0, -3.0, -1.0], token_type=[2, 3, 3] + [6] * 256 + [1, 1, 1, 5]
    )
    assert "[PAD0]" not in json.loads(build_tokenizer(HERE, padded))["model"]["vocab"]
    assert "has the metadata key tokenizer.ggml.remove_extra_whitespaces" in refusal(
        metadata_of(pieces, [0.0, -2.0, -3.0, -1.0], remove_extra_whitespaces=True)
    )


# --- Gemma ---------------------------------------------------------------------------------------------------

RUNS = 9  # length of the longest token of spaces


def gemma(seed: int, space: str) -> dict[str, Any]:
    """Return a vocabulary like Gemma's: user-defined runs of `space` and of line ends, then pieces.

    Texts get no leading space.
    """
    metadata = random_vocabulary(seed)
    pieces = [
        piece for piece in metadata["tokenizer.ggml.tokens"][259:] if not {*piece} <= {"▁"} or piece == "▁"
    ]
    pieces = [piece for piece in pieces if "▁▁" not in piece and "\n\n" not in piece]
    runs = ["\n\n", *(space * n for n in range(2, RUNS + 1))]
    scores = [0.0] * len(runs) + [-float(i) for i in range(len(pieces))]
    types = [2, 3, 3] + [6] * 256 + [4] * len(runs) + [1] * len(pieces)
    return metadata_of([*runs, *pieces], scores, token_type=types, add_space_prefix=False)


@pytest.mark.parametrize("seed", range(3))
def test_gemmas_tokenizer(seed):
    metadata = gemma(seed, " ")
    ours, theirs = built(metadata), transformers_builds("gemma_tokenizer", metadata)

    def fits(text: str) -> bool:
        return " " * (RUNS + 1) not in text and "▁▁" not in text and "\n\n" not in text

    assert_same(ours, theirs, TEXTS, fits)


def test_runs_of_spaces_are_single_tokens_in_either_spelling():
    old, new = built(gemma(0, "▁")), built(gemma(0, " "))
    for text in ("a  b", "   ", "  \n\n   a", " " * 13, " " * 9 + "a", "▁▁"):
        assert old.encode(text).ids == new.encode(text).ids
        assert new.decode(new.encode(text).ids) == text.replace("▁", " ")
    assert new.encode(" " * 13).tokens == [" " * 9, " " * 4]
    assert new.encode("a\n\nb").tokens == ["a", "\n\n", "b"]


def test_a_run_of_spaces_in_both_spellings():
    metadata = metadata_of(["  ", "▁▁"], [0.0, 0.0], token_type=[2, 3, 3] + [6] * 256 + [4, 4])
    assert "has two tokens for the same run of spaces, one of spaces and one of ▁" in refusal(metadata)


def test_without_a_prefix_no_space_is_added_or_stripped():
    ours = built(gemma(0, " "))
    assert ours.decode(ours.encode(" a").ids) == " a"
    assert ours.encode("a").tokens == ["a"]


# --- Phi 3 ---------------------------------------------------------------------------------------------------

PHI = ["<|endoftext|>", "<|end|>", "<|user|>", "▁", "a", "▁a"]


@pytest.mark.parametrize(
    ("architecture", "swallowing"), [("phi3", ["</s>", "<|end|>", "<|user|>"]), ("llama", [])]
)
def test_tokens_of_phi_3_strip_the_spaces_after_them(architecture, swallowing):
    """As in llama.cpp, all special tokens except three strip spaces, although GGUF files do not state this."""
    types = [2, 3, 3] + [6] * 256 + [3, 3, 4, 1, 1, 1]
    metadata = metadata_of(PHI, [0.0, 0.0, 0.0, -2.0, -3.0, -1.0], token_type=types)
    ours = built({"general.architecture": architecture, **metadata})
    plain = ours.encode("a").ids
    for token in ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|end|>", "<|user|>"):
        first, *rest = ours.encode(f"{token}\n a").ids
        assert first == ours.token_to_id(token)
        assert (rest == plain) == (token in swallowing), token
