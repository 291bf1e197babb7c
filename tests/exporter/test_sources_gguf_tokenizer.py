"""GGUF tokenizers against a second implementation in plain Python that shares no code with the first."""

import itertools
import json
import unicodedata
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from precast.exporter.sources.demo import DEMO, fetch
from precast.exporter.sources.gguf.tokenizer import build_tokenizer
from precast.loaders.artifact.cache_folder import cache_folder
from precast.loaders.artifact.errors import PrecastError

HERE = Path("tiny.gguf")

NASTY = [
    "",
    " ",
    "\n",
    "Hello, world! It's 2024-11-22, isn't it? WE'LL SEE, they'RE",
    "the  the   the\tthe\r\nthe\r\n\r\n  the \n \n",
    "1234567890 ١٢٣ ²³ Ⅷ ½ 3.14e-10 １２３",
    "naïve café — e\u0301 vs é, Å vs \u212b, ﬁ, \u1e9b\u0323",
    "日本語テキスト、中文文本。한국어 각",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 \u200d\u200b\ufeff",
    "a<|im_start|>user\nhi<|im_end|>\n<|im_end|> <|im_end|>x<|endoftext|><|im_end",
    "<tool>call</tool> <tool><tool>",
    "  leading and trailing   ",
    "\u00a0\u2003\u2028\u2029\u0085\x1c\x1f\x0b\x0c\x00\x7f",
    "def f(x):\n\treturn x**2 # ok\n\n\nclass A:\n    pass\n",
    "$100 + 5% = <b>~|^</b> `a` \\n",
    "ﷺ \u0301\u0302 நி क्षि ไทย العربية עברית",
    "\U0001f600\U0010ffff\U00020000",
]

# Only characters that this Python's Unicode tables contain; the libraries' newer tables agree on these.
TEXT = st.lists(
    st.one_of(
        st.characters(exclude_categories=("Cs", "Cn")).map(str),
        st.sampled_from(
            ["<|im_end|>", "<|im_start|>", "<tool>", "[PAD0]", "the", " the", "hello", "'s", "'LL", "123"]
        ),
        st.sampled_from(
            [" ", "  ", "\t", "\n", "\r\n", "\n\n", "0", "9", "٣", "e\u0301", "\u200d", "👩‍👧", "日本", "é"]
        ),
    ),
    max_size=30,
).map("".join)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


_ENDINGS = "(?:'(?:[sS]|[tT]|[rR][eE]|[vV][eE]|[mM]|[lL][lL]|[dD]))"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%(endings)s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%(endings)s"
    r"|%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def cut(pattern: str, pieces: list[str], flags: int = 0) -> list[str]:
    """Split each piece at the matches of a pattern; keep the matches and the text between them."""
    out = []
    for piece in pieces:
        end = 0
        for match in regex.finditer(pattern, piece, flags):
            out += [piece[end : match.start()], match[0]]
            end = match.end()
        out.append(piece[end:])
    return [piece for piece in out if piece]


def pre_tokenize(pre: str, text: str) -> list[str]:
    if pre == "smollm":
        return cut(_GPT2, cut(r"\p{N}", [text]))
    if pre in ("gpt-2", "olmo"):
        return cut(_GPT2, [text])
    if pre == "tekken":
        return cut(_CASED % {"endings": "", "digits": r"\p{N}"}, [text])
    if pre == "gpt-4o":
        return cut(_CASED % {"endings": f"{_ENDINGS}?", "digits": r"\p{N}{1,3}"}, [text])
    if pre == "falcon":
        return cut(_GPT2, cut(r"[\p{P}$+<=>^`|~]+", [text]))
    if pre in ("llama-bpe", "dbrx"):
        return cut(_CL100K % "{1,3}", [text], regex.IGNORECASE)
    if pre == "qwen2":
        return cut(_CL100K % "", [text], regex.IGNORECASE)
    assert pre == "default"
    pieces = cut(r"[\p{P}$+<=>^~|]+", [text])
    pieces = cut(_GPT2.removesuffix(r"|\s+"), pieces)
    return cut("[0-9][0-9][0-9]", cut(r"\p{N}+", pieces))


NORMALISING = ("qwen2", "olmo")


class PlainBpe:
    """Apply byte-level BPE in the simplest way."""

    def __init__(self, metadata: dict, alphabet: dict[int, str]) -> None:
        tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        self.pre = metadata["tokenizer.ggml.pre"]
        self.ids = {token: i for i, token in enumerate(tokens) if types[i] != 5}
        self.ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(metadata["tokenizer.ggml.merges"])}
        self.alphabet = alphabet
        whole = sorted(
            (token for token, kind in zip(tokens, types, strict=True) if kind in (2, 3, 4)), key=len
        )
        self.whole = set(whole)
        self.whole_pattern = "|".join(map(regex.escape, reversed(whole)))

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in cut(self.whole_pattern, [text]):
            if piece in self.whole:
                ids.append(self.ids[piece])
                continue
            piece = unicodedata.normalize("NFC", piece) if self.pre in NORMALISING else piece
            for word in pre_tokenize(self.pre, piece):
                printable = "".join(self.alphabet[byte] for byte in word.encode())
                for part in self.cut_printable(printable):
                    ids += self.merge(part)
        return ids

    def cut_printable(self, word: str) -> list[str]:
        """Falcon's tokenizer splits digits after bytes have become characters, which include ² and ¼."""
        return cut("[0-9][0-9][0-9]", cut(r"\p{N}+", [word])) if self.pre == "falcon" else [word]

    def merge(self, word: str) -> list[int]:
        if self.pre in ("llama-bpe", "tekken") and word in self.ids:
            return [self.ids[word]]
        parts = [character for character in word if character in self.ids]
        while len(parts) > 1:
            rank, at = min(
                (self.ranks.get(pair, 10**9), i) for i, pair in enumerate(itertools.pairwise(parts))
            )
            if rank == 10**9:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ids[part] for part in parts]


def built(metadata: dict) -> Tokenizer:
    return Tokenizer.from_str(build_tokenizer(HERE, metadata).decode())


def refusal(metadata: dict) -> str:
    with pytest.raises(PrecastError) as caught:
        build_tokenizer(HERE, metadata)
    return str(caught.value)


PRES = ["smollm", "gpt-2", "llama-bpe", "qwen2", "default", "olmo", "dbrx", "tekken", "gpt-4o", "falcon"]


@pytest.fixture(params=PRES)
def pair(request, tiny):
    """For each pre-tokenizer, return two tokenizers of the tiny vocabulary: precast's, and one in plain Python."""
    metadata = tiny.vocabulary() | {
        "tokenizer.ggml.pre": request.param,
        "tokenizer.ggml.add_bos_token": False,
    }
    return built(metadata), PlainBpe(metadata, tiny.alphabet())


@pytest.fixture(scope="module")
def demo_metadata():
    from gguf import GGUFReader

    try:
        path = fetch(DEMO, cache_folder() / "demo")
    except PrecastError as error:
        pytest.skip(f"no demo model: {error}")
    return {key: value.contents() for key, value in GGUFReader(path).fields.items()}


# --- byte-level ---------------------------------------------------------------------------------------------


def test_nasty_texts(pair):
    ours, plain = pair
    for text in NASTY:
        assert ours.encode(text).ids == plain.encode(text), repr(text)


def test_any_text(pair):
    ours, plain = pair

    @settings(deadline=None, max_examples=200)
    @given(TEXT)
    def check(text):
        ids = ours.encode(text).ids
        assert ids == plain.encode(text)
        if plain.pre not in NORMALISING:
            assert ours.decode(ids, skip_special_tokens=False) == text

    check()


@pytest.mark.parametrize("text", NASTY)
def test_the_demo_tokenizer_on_nasty_texts(demo_metadata, tiny, text):
    ours, plain = built(demo_metadata), PlainBpe(demo_metadata, tiny.alphabet())
    assert ours.encode(text).ids == plain.encode(text)


def test_the_demo_tokenizer_on_any_text(demo_metadata, tiny):
    ours, plain = built(demo_metadata), PlainBpe(demo_metadata, tiny.alphabet())

    @settings(deadline=None, max_examples=300)
    @given(TEXT)
    def check(text):
        assert ours.encode(text).ids == plain.encode(text)

    check()


def test_the_demo_tokenizer_splits_digits(demo_metadata):
    assert built(demo_metadata).encode("In 2024").tokens == ["In", "Ġ", "2", "0", "2", "4"]


def test_the_tokenizer_of_qwen2_equals_transformers():
    """Compare pattern and normalizer with the published tokenizer, as far as transformers contains it."""
    qwen2 = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
    theirs = json.loads(qwen2.Qwen2Tokenizer().backend_tokenizer.to_str())
    tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": []}
    ours = json.loads(build_tokenizer(HERE, tokens | {"tokenizer.ggml.pre": "qwen2"}))
    assert ours["normalizer"] == theirs["normalizer"]
    split, byte_level = ours["pre_tokenizer"]["pretokenizers"]
    assert split == theirs["pre_tokenizer"]["pretokenizers"][0]
    assert byte_level | {"trim_offsets": False} == theirs["pre_tokenizer"]["pretokenizers"][1] | {
        "trim_offsets": False
    }


@pytest.mark.parametrize(
    "pre", ["llama-bpe", "dbrx", "tekken", "gpt-4o", "llama4", "qwen2", "deepseek-r1-qwen"]
)
def test_pre_tokenizers_equal_transformers(pre):
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": []}
    metadata = tokens | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    ours = json.loads(build_tokenizer(HERE, metadata))["pre_tokenizer"]["pretokenizers"]
    assert ours[0]["pattern"] == {"Regex": mapping.GGUF_PRE_TOKENIZER_SPLITS[pre]}


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("phi-2", "gpt-2"),
        ("starcoder", "smollm"),
        ("refact", "smollm"),
        ("llama4", "gpt-4o"),
        ("llama3", "llama-bpe"),
    ],
)
def test_names_of_the_same_pre_tokenizer(tiny, name, same):
    metadata = tiny.vocabulary()
    built_as = [build_tokenizer(HERE, metadata | {"tokenizer.ggml.pre": pre}) for pre in (name, same)]
    assert built_as[0] == built_as[1]


def test_llama_3_does_not_merge_a_piece_that_is_a_token(tiny):
    """With `ignore_merges`, "zq" is a token although no merge forms it."""
    metadata = tiny.vocabulary()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][:-1], "zq"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"][:-1], 1]
    llama = built(metadata | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False})
    assert llama.encode("zq").tokens == ["zq"]
    assert built(metadata | {"tokenizer.ggml.pre": "smollm"}).encode("zq").tokens == ["z", "q"]


def test_token_types(tiny):
    document = json.loads(build_tokenizer(HERE, tiny.vocabulary()))
    assert {token["content"]: token["special"] for token in document["added_tokens"]} == {
        "<|endoftext|>": True,
        "<|im_start|>": True,
        "<|im_end|>": True,
        "<tool>": False,
    }
    assert "[PAD0]" not in document["model"]["vocab"]
    tokenizer = built(tiny.vocabulary())
    ids = tokenizer.encode("<tool>the<|im_end|>").ids
    assert tokenizer.decode(ids) == "<tool>the"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<tool>the<|im_end|>"


@pytest.mark.parametrize(
    ("metadata", "added"),
    [
        ({}, ([], [])),
        ({"add_bos_token": False}, ([], [])),
        ({"add_bos_token": True}, ([1], [])),
        ({"add_bos_token": True, "add_eos_token": True}, ([1], [2])),
        ({"add_eos_token": True}, ([], [2])),
        ({"pre": "llama-bpe"}, ([1], [])),
        ({"pre": "llama-bpe", "add_bos_token": False}, ([], [])),
    ],
)
def test_bos_and_eos(tiny, metadata, added):
    tokenizer = built(tiny.vocabulary() | {f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    bare = tokenizer.encode("the", add_special_tokens=False).ids
    assert tokenizer.encode("the").ids == added[0] + bare + added[1]


def test_the_same_metadata_gives_the_same_bytes(tiny):
    assert build_tokenizer(HERE, tiny.vocabulary()) == build_tokenizer(HERE, tiny.vocabulary())


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (
            {"pre": "deepseek-llm"},
            (
                "expected tokenizer.ggml.pre to be one of default, gpt-2, gpt2, phi-2, olmo, llama-bpe, llama-v3,"
                " llama3, dbrx, qwen2, deepseek-r1-qwen, smollm, starcoder, refact, falcon, tekken, gpt-4o, llama4,"
                " found deepseek-llm; use the model's Hugging Face checkpoint."
            ),
        ),
        (
            {"pre": None},
            "lacks the metadata key tokenizer.ggml.pre, which names the pre-tokenizer; convert the model again with a",
        ),
        ({"model": "rwkv"}, "expected tokenizer.ggml.model to be gpt2 or llama, found rwkv"),
        ({"tokens": None}, "contains no vocabulary (tokenizer.ggml.tokens)"),
        ({"token_type": [1]}, "tokens but 1 token types"),
        ({"merges": None}, "lacks the metadata key tokenizer.ggml.merges"),
        ({"merges": ["a b c"]}, "expected merges of two tokens, found 'a b c'"),
        ({"merges": ["a zz"]}, "has an inconsistent tokenizer ("),
        (
            {"add_bos_token": True, "bos_token_id": None},
            "adds the BOS token to every text, but tokenizer.ggml.bos_token_id names no token (None)",
        ),
        (
            {"brand_new": 1},
            "has the metadata key tokenizer.ggml.brand_new, which is not understood",
        ),
        ({"remove_extra_whitespaces": True}, "has the metadata key tokenizer.ggml.remove_extra_whitespaces"),
    ],
)
def test_refusals(tiny, metadata, expected):
    changed = tiny.vocabulary() | {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    assert expected in refusal({key: value for key, value in changed.items() if value is not None})


def test_an_unknown_type_and_a_duplicate_token(tiny):
    metadata = tiny.vocabulary()
    types = metadata["tokenizer.ggml.token_type"]
    assert "has tokens of type 9" in refusal(metadata | {"tokenizer.ggml.token_type": [9, *types[1:]]})
    tokens = metadata["tokenizer.ggml.tokens"]
    assert "has the token '<|im_start|>' twice" in refusal(
        metadata | {"tokenizer.ggml.tokens": [tokens[1], *tokens[1:]]}
    )


# --- SentencePiece ------------------------------------------------------------------------------------------

PIECES = [
    "▁",
    "t",
    "h",
    "e",
    "a",
    "l",
    "o",
    "▁t",
    "he",
    "▁the",
    "▁h",
    "ll",
    "ell",
    "▁hell",
    "▁hello",
    "llo",
    "▁▁",
    "日",
    "é",
]


def sentencepiece_vocabulary() -> dict:
    """Return a vocabulary of <unk>, <s>, </s>, the bytes and pieces; longer pieces have higher scores."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    scores = [0.0] * 259 + [-100.0 + 5 * len(piece) + 0.01 * i for i, piece in enumerate(PIECES)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *bytes_, *PIECES],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def plain_sentencepiece(metadata: dict, text: str, prefix: bool) -> list[int]:
    """Repeatedly join the leftmost pair of neighbours whose piece has the highest score."""
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    out = []
    for part in cut("<s>|</s>|<unk>", [text]):
        if part in ("<s>", "</s>", "<unk>"):
            out.append(ids[part])
            continue
        symbols = list((" " + part if prefix else part).replace(" ", "▁"))
        while True:
            joined = [
                (-scores[ids[a + b]], i)
                for i, (a, b) in enumerate(itertools.pairwise(symbols))
                if ids.get(a + b, 0) >= 259
            ]
            if not joined:
                break
            at = min(joined)[1]
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        for symbol in symbols:
            out += [ids[symbol]] if ids.get(symbol, 0) >= 259 else [byte + 3 for byte in symbol.encode()]
    return out


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_on_any_text(prefix):
    metadata = sentencepiece_vocabulary() | {"tokenizer.ggml.add_space_prefix": prefix}
    ours = built(metadata)

    @settings(deadline=None, max_examples=300)
    @given(
        st.one_of(
            TEXT,
            st.text(alphabet=" thelo日é\n", max_size=40),
            st.lists(st.sampled_from([" hello", "</s>", "the", " "])).map("".join),
        )
    )
    def check(text):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == plain_sentencepiece(metadata, text, prefix)
        if "</s>" not in text and "▁" not in text:
            assert ours.decode(ids) == text

    check()


def test_sentencepiece_adds_bos_unless_told_otherwise():
    metadata = sentencepiece_vocabulary()
    assert built(metadata).encode("the").tokens == ["<s>", "▁the"]
    assert built(metadata | {"tokenizer.ggml.add_bos_token": False}).encode("the").tokens == ["▁the"]


def test_sentencepiece_refusals():
    metadata = sentencepiece_vocabulary()
    assert (
        "has the pre-tokenizer llama-bpe (tokenizer.ggml.pre), which a SentencePiece tokenizer does not have"
        in refusal(metadata | {"tokenizer.ggml.pre": "llama-bpe"})
    )
    assert "lacks a score for each token" in refusal(metadata | {"tokenizer.ggml.scores": [0.0]})
