"""The tokenizer compared with the library's own decoding, for arbitrary ids and texts."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.text.chat_messages import ChatOptions
from precast.loaders.text.tokenizer import Tokenizer

TEXT = [
    "the cat sat on the mat — naïve café, 日本語 😀",
    "it's 12:30, said the cat\n\n    indented",
    "über 100 € 😀😀",
]
FFFD = "\N{REPLACEMENT CHARACTER}"


def wrap(library: tokenizers.Tokenizer, **settings) -> Tokenizer:
    options = {"chat_template": None, "bos_token": "<s>", "eos_token": "</s>"} | settings
    return Tokenizer.from_json(library.to_str().encode(), **options)


def test_a_token_is_found_without_a_copy_of_the_vocabulary() -> None:
    """The library copies its vocabulary at each call, and accepts only ids of 32 bits."""

    class Library:
        def id_to_token(self, token_id: int) -> str | None:
            if not 0 <= token_id < 1 << 32:
                raise OverflowError(token_id)
            return {0: "a", 1: "b"}.get(token_id)

    options = {"chat_template": None, "named_templates": {}, "bos_token": None, "eos_token": None}
    tokenizer = Tokenizer(Library(), **options)  # type: ignore[arg-type]
    assert [tokenizer.token(i) for i in (-1, 0, 1, 2, 1 << 32)] == [None, "a", "b", None, None]


def byte_level() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    library.train_from_iterator(TEXT, trainer)
    # An added token that is not special, with characters outside the byte alphabet; and a literal U+FFFD.
    library.add_tokens(["a b 日", FFFD, "<think>"])
    return library


def sentencepiece(decoder: str) -> tokenizers.Tokenizer:
    """Llama-2's layout: three special tokens, 256 byte tokens, pieces with ▁ for a space."""
    pieces = ["▁", "▁▁", "▁▁▁▁", *"abcdeth", "▁a", "▁th", "th", "▁the", FFFD, "é", "▁€"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("▁", "a"), ("t", "h"), ("▁", "th"), ("▁th", "e"), ("▁", "▁"), ("▁▁", "▁▁")]
    library = tokenizers.Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps = {
        "llama": [*steps, decoders.Strip(" ", 1, 0)],
        "gemma": steps,
        "metaspace": [decoders.ByteFallback(), decoders.Metaspace()],
    }[decoder]
    library.decoder = decoders.Sequence(steps)
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.add_tokens(["<think>"])
    library.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return library


def wordpiece() -> tokenizers.Tokenizer:
    names = ["[UNK]", "the", "cat", "##s", "##at", ",", ".", "'", "n't", FFFD]
    library = tokenizers.Tokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece()
    return library


def no_decoder() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, FFFD: 2}, unk_token="a"))


TOKENIZERS = {
    "byte_level": wrap(byte_level()),
    "llama": wrap(sentencepiece("llama")),
    "gemma": wrap(sentencepiece("gemma")),
    "metaspace": wrap(sentencepiece("metaspace")),
    "wordpiece": wrap(wordpiece()),
    "no_decoder": wrap(no_decoder()),
}
BYTE_TOKENS = ("llama", "gemma", "metaspace")
ReplacedBytes = Callable[..., list[int]]
EVERY = pytest.mark.parametrize("name", TOKENIZERS)


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    """Return the text after each token, then after `finish`."""
    stream = tokenizer.stream(skip_special_tokens=skip)
    shown = [""]
    for token_id in ids:
        shown.append(shown[-1] + stream.push(token_id))
    return [*shown[1:], shown[-1] + stream.finish()]


@st.composite
def id_lists(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    size = tokenizer.vocab_size
    anything = st.integers(0, size + 2)  # includes ids without a token
    # Runs of byte tokens that form characters, because random ids hardly ever form any.
    texts = st.text(max_size=4).map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    parts = draw(st.lists(st.one_of(anything.map(lambda i: [i]), texts), max_size=12))
    return [token_id for part in parts for token_id in part]


@EVERY
@settings(deadline=None, max_examples=300)
@given(data=st.data(), skip=st.booleans())
def test_a_stream_of_any_ids_equals_decode(
    name: str, replaced_bytes: ReplacedBytes, data: st.DataObject, skip: bool
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(id_lists(tokenizer))
    expected = replaced_bytes(tokenizer, ids, skip=skip) if name in BYTE_TOKENS else ids
    assert streamed(tokenizer, ids, skip=skip)[-1] == tokenizer.decode(expected, skip_special_tokens=skip)


@EVERY
@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=30))
def test_a_stream_never_shows_part_of_a_character(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    shown = streamed(tokenizer, ids)
    assert shown[-1] == whole
    assert all(whole.startswith(part) for part in shown)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=30))
def test_decode_inverts_encode(text: str) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("name", ["byte_level", "llama"])
def test_incomplete_characters_are_held_back_and_broken_ones_replaced(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    library = tokenizer._library
    if name == "llama":
        lead, tail = library.token_to_id("<0xC3>"), library.token_to_id("<0xA9>")
    else:
        lead, tail = library.token_to_id("Ã"), library.token_to_id("©")
    letter = library.token_to_id("a")
    assert streamed(tokenizer, [letter, lead, tail]) == ["a", "a", "aé", "aé"]
    assert streamed(tokenizer, [letter, lead]) == ["a", "a", f"a{FFFD}"]
    assert streamed(tokenizer, [lead, letter]) == ["", f"{FFFD}a", f"{FFFD}a"]


def test_leading_space_is_dropped_at_the_start_only() -> None:
    tokenizer = TOKENIZERS["llama"]
    the, space, bos = (tokenizer._library.token_to_id(token) for token in ("▁the", "▁", "<s>"))
    assert streamed(tokenizer, [bos, the, the]) == ["", "the", "the the", "the the"]
    assert streamed(tokenizer, [space, bos, the])[-1] == " the"


def test_characters_returned_before_a_run_breaks_stay() -> None:
    tokenizer = TOKENIZERS["llama"]
    ids = [tokenizer._library.token_to_id(token) for token in ("<0xC3>", "<0xA9>", "<0xFF>", "<0x41>", "a")]
    assert tokenizer.decode(ids) == FFFD * 4 + "a"  # the library takes the é back
    assert streamed(tokenizer, ids) == [
        "",
        "é",
        f"é{FFFD}",
        f"é{FFFD}{FFFD}",
        f"é{FFFD}{FFFD}a",
        f"é{FFFD}{FFFD}a",
    ]


def test_a_long_stream_decodes_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the ids in each call of the library, for all decoders, and for ids that never form a character."""
    for name in TOKENIZERS:
        stream = TOKENIZERS[name].stream()
        sizes: list[int] = []
        real = stream._library

        class Counting:
            id_to_token = staticmethod(real.id_to_token)

            @staticmethod
            def decode(ids, skip_special_tokens, real=real, sizes=sizes):
                sizes.append(len(ids))
                return real.decode(ids, skip_special_tokens=skip_special_tokens)

        stream._library = Counting()
        for token_id in [*range(TOKENIZERS[name].vocab_size), *[5] * 300]:
            stream.push(token_id)
        assert max(sizes, default=0) <= 12


def test_special_tokens_are_skipped_or_shown() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("<s>cat</s><think>")
    assert tokenizer.decode(ids) == streamed(tokenizer, ids)[-1] == "cat<think>"
    kept = tokenizer.decode(ids, skip_special_tokens=False)
    assert kept == streamed(tokenizer, ids, skip=False)[-1] == "<s>cat</s><think>"


def test_special_tokens_are_added_only_on_request() -> None:
    tokenizer = TOKENIZERS["llama"]
    with_bos, without = tokenizer.encode("the"), tokenizer.encode("the", add_special_tokens=False)
    assert with_bos == [1, *without]


def test_vocab_size_counts_added_tokens() -> None:
    library = no_decoder()
    assert wrap(library).vocab_size == 3
    library.add_special_tokens(["<s>"])
    assert wrap(library).vocab_size == 4


def test_truncation_and_padding_of_the_file_are_switched_off() -> None:
    library = byte_level()
    library.enable_truncation(2)
    library.enable_padding(length=64)
    expected = TOKENIZERS["byte_level"].encode("the cat sat on the mat")
    assert len(expected) > 2
    assert wrap(library).encode("the cat sat on the mat") == expected


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"not json", b"\xff\xfe", b'{"version": "1.0", "model": {"type": "X"}}']
)
def test_the_error_for_a_bad_file_is_one_sentence(data: bytes) -> None:
    with pytest.raises(
        PrecastError, match=r"^tokenizer\.json: expected a tokenizer .* export the model again\.$"
    ):
        Tokenizer.from_json(data, chat_template=None, bos_token=None, eos_token=None)


def test_text_that_is_not_unicode_is_one_sentence() -> None:
    with pytest.raises(
        PrecastError, match=r"^prompt: expected text in UTF-8, found other bytes; convert the text first\.$"
    ):
        TOKENIZERS["byte_level"].encode("half a pair: \ud800")


def test_negative_ids_are_one_sentence() -> None:
    with pytest.raises(
        PrecastError, match=r"^Tokenizer: expected token ids from 0 to 2\^32 - 1, found \[-1\]\.$"
    ):
        TOKENIZERS["byte_level"].decode([-1])
    with pytest.raises(
        PrecastError, match=r"^Tokenizer: expected a token id from 0 to 2\^32 - 1, found -1\.$"
    ):
        TOKENIZERS["byte_level"].stream().push(-1)


def test_chat_is_rendered_by_the_template() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    template += (
        "{% if add_generation_prompt %}[assistant]{% endif %}{% if tools %}{{ tools | length }}{% endif %}"
    )
    tokenizer = wrap(no_decoder(), chat_template=template)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages) == "<s>[user]hi</s>[assistant]"
    assert (
        tokenizer.render_chat(
            messages,
            ChatOptions(add_generation_prompt=False, tools=[{"type": "function", "function": {"name": "f"}}]),
        )
        == "<s>[user]hi</s>1"
    )


def test_documents_and_variables_reach_the_template() -> None:
    template = "{{ documents[0].text if documents else 'none' }} {{ enable_thinking | default('unset') }}"
    tokenizer = wrap(no_decoder(), chat_template=template)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages) == "none unset"
    options = ChatOptions(documents=[{"text": "a"}], variables={"enable_thinking": False})
    assert tokenizer.render_chat(messages, options) == "a False"


def test_chat_without_a_template_is_one_sentence() -> None:
    with pytest.raises(
        PrecastError, match=r"^Chat: this artifact has no chat template, .* with a template\.$"
    ):
        TOKENIZERS["llama"].render_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("module", ["generation.sampling", "generation.stopping", "text.tokenizer"])
def test_importing_is_cheap(module: str) -> None:
    code = (
        f"import sys, precast.loaders.{module};"
        " print(*sorted({'jinja2', 'tokenizers', 'jax', 'jaxlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_first_chat_imports_jinja() -> None:
    code = """if True:
        import sys
        import tokenizers
        from precast.loaders.text.tokenizer import Tokenizer
        data = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).to_str().encode()
        made = Tokenizer.from_json(data, chat_template="x", bos_token=None, eos_token=None)
        made.stream().push(made.encode("a")[0])
        assert "jinja2" not in sys.modules
        made.render_chat([{"role": "user", "content": "a"}])
        assert "jinja2" in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
