"""Small tokenizers of all families that models use: a stream's text equals the decoded text."""

import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.model import Model
from precast.loaders.text.tokenizer import Tokenizer

CORPUS = [
    "the cat sat on the mat, and the dog sat on the cat",
    "it's 12:30 in the café; naïve über-cats cost 100 € each",
    "def main(n):\n    return n\n\n    indented",
    "the mat the mat the mat the cat's mat",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FFFD = "\N{REPLACEMENT CHARACTER}"
BOS = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
LLAMA_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}<|assistant|>\n"
)


def with_byte_tokens(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer whose byte tokens are in the vocabulary and not added tokens, as in SentencePiece."""
    document = json.loads(library.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] not in BYTES]
    document["model"]["byte_fallback"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(document))


def sentencepiece_bpe(
    *,
    normalizer: normalizers.Normalizer | None = None,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
    decoder: decoders.Decoder,
) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    library.normalizer, library.pre_tokenizer = normalizer, pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=[*SPECIAL, *BYTES], limit_alphabet=40, show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    library.decoder, library.post_processor = decoder, BOS
    return with_byte_tokens(library)


def llama2() -> tokenizers.Tokenizer:
    return sentencepiece_bpe(
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Sequence([*LLAMA_DECODER, decoders.Strip(" ", 1, 0)]),
    )


def mistral() -> tokenizers.Tokenizer:
    return sentencepiece_bpe(
        pre_tokenizer=pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False),
        decoder=decoders.Sequence([*LLAMA_DECODER, decoders.Strip(" ", 1, 0)]),
    )


def gemma() -> tokenizers.Tokenizer:
    return sentencepiece_bpe(
        normalizer=normalizers.Replace(" ", "▁"),
        pre_tokenizer=pre_tokenizers.Split(" ", "merged_with_previous"),
        decoder=decoders.Sequence(LLAMA_DECODER),
    )


def unigram(*, byte_tokens: bool) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokens = [*SPECIAL, *BYTES] if byte_tokens else SPECIAL
    trainer = trainers.UnigramTrainer(
        vocab_size=60 + len(tokens), special_tokens=tokens, unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    library.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    if not byte_tokens:
        return library
    library.decoder = decoders.Sequence([decoders.ByteFallback(), library.decoder])
    return with_byte_tokens(library)


def byte_level(post_processor: processors.PostProcessor, decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    words = Regex(r"\p{L}+| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    library.decoder, library.post_processor = decoder, post_processor
    return library


def llama3() -> tokenizers.Tokenizer:
    rule = processors.Sequence([processors.ByteLevel(trim_offsets=False), BOS])
    return byte_level(rule, decoders.ByteLevel())


def gpt2() -> tokenizers.Tokenizer:
    decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])
    return byte_level(processors.ByteLevel(trim_offsets=False), decoder)


def suffixed() -> tokenizers.Tokenizer:
    """Return a tokenizer of the oldest BPE kind, in which the last token of a word marks its end."""
    library = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    library.decoder = decoders.BPEDecoder("</w>")
    return library


FAMILIES: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "llama2": llama2,
    "mistral": mistral,
    "gemma": gemma,
    "unigram": lambda: unigram(byte_tokens=False),
    "unigram_bytes": lambda: unigram(byte_tokens=True),
    "llama3": llama3,
    "gpt2": gpt2,
    "suffixed": suffixed,
}
BYTE_TOKENS = ("llama2", "mistral", "gemma", "unigram_bytes")
LOSSLESS = (*BYTE_TOKENS, "llama3", "gpt2")
# (bos, eos) that a prompt gets; the other families add only bos.
ADDS = {
    "unigram": (1, 1),
    "unigram_bytes": (1, 1),
    "gpt2": (0, 0),
    "suffixed": (0, 0),
}


@pytest.fixture(scope="module")
def family() -> Callable[[str], Tokenizer]:
    """Return a function that makes the tokenizer of a family, as in an artifact. Each tokenizer is trained once."""
    made: dict[str, Tokenizer] = {}

    def make(name: str) -> Tokenizer:
        if name not in made:
            library = FAMILIES[name]()
            # Special tokens that absorb spaces, an ordinary added token, and the replacement character.
            library.add_special_tokens(
                [AddedToken("<|user|>", rstrip=True), AddedToken("<|assistant|>", rstrip=True)]
            )
            library.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", FFFD)])
            made[name] = Tokenizer.from_json(
                library.to_str().encode(), chat_template=TEMPLATE, bos_token="<s>", eos_token="</s>"
            )
        return made[name]

    return make


EVERY = pytest.mark.parametrize("name", FAMILIES)


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return [*[stream.push(token_id) for token_id in ids], stream.finish()]


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    ids = [tokenizer._library.token_to_id(token) for token in tokens]
    assert None not in ids
    return ids


def largest_id(tokenizer: Tokenizer) -> int:
    return max(tokenizer._library.get_vocab(with_added_tokens=True).values())


@st.composite
def id_lists(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    anything = st.integers(0, largest_id(tokenizer) + 2).map(lambda token_id: [token_id])
    texts = st.text(max_size=4).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    parts = draw(st.lists(st.one_of(anything, texts), max_size=12))
    return [token_id for part in parts for token_id in part]


@EVERY
@settings(deadline=None, max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_a_stream_of_any_ids_equals_decode(name, family, replaced_bytes, data, skip):
    tokenizer = family(name)
    ids = data.draw(id_lists(tokenizer))
    whole = "".join(streamed(tokenizer, ids, skip=skip))
    expected = replaced_bytes(tokenizer, ids, skip=skip) if name in BYTE_TOKENS else ids
    assert whole == tokenizer.decode(expected, skip_special_tokens=skip)


@pytest.mark.parametrize("name", LOSSLESS)
@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=20).filter(lambda text: "▁" not in text and not text.startswith(" ")))
def test_decode_inverts_encode(name, family, text):
    tokenizer = family(name)
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", LOSSLESS)
@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=20).filter(lambda text: "▁" not in text and not text.startswith(" ")))
def test_the_bytes_of_tokens_are_the_text(name, family, text):
    tokenizer = family(name)
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(tokenizer.token_bytes(token_id) for token_id in ids).decode()
    # Only the first token of a text loses a space.
    assert joined.removeprefix(" ") == text
    assert all(tokenizer.token_text(token_id) for token_id in ids)


@EVERY
def test_the_bytes_of_special_and_missing_tokens(name, family):
    tokenizer = family(name)
    assert tokenizer.token_bytes(largest_id(tokenizer) + 1) == b""
    (user,) = ids_of(tokenizer, "<|user|>")
    assert tokenizer.token_text(user).strip() == "<|user|>"


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_character_of_several_tokens_is_shown_when_it_is_whole(name, family):
    tokenizer = family(name)
    ids = tokenizer.encode("the 😀 cat", add_special_tokens=False)
    shown = streamed(tokenizer, ids)
    assert "".join(shown) == "the 😀 cat"
    assert sum("😀" in piece for piece in shown) == 1
    assert shown[shown.index("😀") - 3 : shown.index("😀")] == [""] * 3


@pytest.mark.parametrize("name", [*BYTE_TOKENS, "unigram"])
def test_the_leading_space_is_dropped_at_the_start_of_a_text_only(name, family):
    tokenizer = family(name)
    word = max(token for token in tokenizer._library.get_vocab() if token.rfind("▁") == 0)
    middle = word.replace("▁", " ")
    first = middle if name == "gemma" else word[1:]  # Gemma adds no leading space
    one, bos, think = ids_of(tokenizer, word, "<s>", "<think>")
    assert streamed(tokenizer, [bos, one, one, bos, one]) == ["", first, middle, "", middle, ""]
    assert streamed(tokenizer, [think, one]) == ["<think>", middle, ""]
    if name in BYTE_TOKENS:
        letter = ids_of(tokenizer, "<0xC3>", "<0xA9>")
        assert streamed(tokenizer, [*letter, one]) == ["", "é", middle, ""]


@EVERY
def test_special_tokens_are_shown_only_on_request(name, family):
    tokenizer = family(name)
    ids = ids_of(tokenizer, "<s>", "<|user|>", "<think>", "</s>")
    assert "".join(streamed(tokenizer, ids)) == "<think>"
    shown = "".join(streamed(tokenizer, ids, skip=False))
    assert shown.replace(" ", "") == "<s><|user|><think></s>"


@EVERY
def test_bos_and_eos_of_a_prompt(name, family):
    tokenizer = family(name)
    bos, eos = ADDS.get(name, (1, 0))
    inside = tokenizer.encode("the cat", add_special_tokens=False)
    assert tokenizer.encode("the cat") == [1] * bos + inside + [2] * eos
    assert not {1, 2} & set(inside)


@EVERY
def test_a_chat_has_one_bos_which_the_template_writes(name, family):
    tokenizer = family(name)
    spec = SimpleNamespace(eos_token_ids=(2,))
    model = Model(
        engine=SimpleNamespace(buckets=(64,), score_tokens=0),
        tokenizer=tokenizer,
        manifest=SimpleNamespace(tokenizer=spec),
        target=SimpleNamespace(kernels=()),
        compiles=0,
    )
    ids = model.chat_prompt([{"role": "user", "content": "the cat"}])
    user, assistant = ids_of(tokenizer, "<|user|>", "<|assistant|>")
    assert [i for i in ids if i in (1, 2, user, assistant)] == [1, user, 2, assistant]
    assert ids[0] == 1
    # The rule for plain prompts would add a second token.
    text = tokenizer.render_chat([{"role": "user", "content": "the cat"}])
    assert tokenizer.encode(text).count(1) == 1 + ADDS.get(name, (1, 0))[0]


@EVERY
def test_a_chat_is_tokenised_as_by_transformers(name, family):
    transformers = pytest.importorskip("transformers")
    tokenizer = family(name)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._library, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    messages = [{"role": "user", "content": " the café 😀\n"}, {"role": "assistant", "content": "ok"}]
    expected = theirs.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False) == expected
    assert tokenizer.decode(expected) == theirs.decode(
        expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize("name", LOSSLESS)
def test_spaces_that_an_added_token_absorbs(name, family):
    tokenizer = family(name)
    library = tokenizers.Tokenizer.from_str(tokenizer._library.to_str())
    library.add_tokens(
        [
            AddedToken("<l>", lstrip=True, normalized=False),
            AddedToken("<w>", single_word=True, normalized=False),
            AddedToken("<n>", normalized=False),
        ]
    )
    tokenizer = Tokenizer.from_json(
        library.to_str().encode(), chat_template=None, bos_token=None, eos_token=None
    )
    left, word, neither, user = ids_of(tokenizer, "<l>", "<w>", "<n>", "<|user|>")

    def between(text: str, token: int) -> tuple[str, str]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        at = ids.index(token)
        return tokenizer.decode(ids[:at]), tokenizer.decode(ids[at + 1 :])

    assert between("cat \n<|user|> \n mat", user)[1].strip(" ") == "mat"
    assert between("cat \n<l>mat", left)[0] == "cat"
    assert between("cat \n<n>\nmat", neither) == ("cat \n", "\nmat")
    assert word in tokenizer.encode("cat <w> mat")
    assert word not in tokenizer.encode("cat<w>mat")


def test_an_added_token_with_the_flag_normalized_matches_normalised_text(family):
    library = tokenizers.Tokenizer.from_str(family("llama3")._library.to_str())
    library.normalizer = normalizers.Lowercase()
    library.add_tokens([AddedToken("<Aa>", normalized=True), AddedToken("<Bb>", normalized=False)])
    tokenizer = Tokenizer.from_json(
        library.to_str().encode(), chat_template=None, bos_token=None, eos_token=None
    )
    normalised, exact = ids_of(tokenizer, "<Aa>", "<Bb>")
    assert normalised in tokenizer.encode("<AA>")
    assert exact in tokenizer.encode("<Bb>")
    assert exact not in tokenizer.encode("<bb>")


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (decoders.CTC(), "CTC"),
        (decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()]), r"Fuse \+ ByteLevel"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]), r"ByteLevel \+ Strip"),
    ],
)
def test_a_decoder_without_streaming_is_refused(family, decoder, name):
    library = tokenizers.Tokenizer.from_str(family("gpt2")._library.to_str())
    library.decoder = decoder
    with pytest.raises(
        PrecastError,
        match=rf"^tokenizer\.json: the decoder {name} cannot decode token by token .*another tokenizer\.$",
    ):
        Tokenizer.from_json(library.to_str().encode(), chat_template=None, bos_token=None, eos_token=None)
