"""A tokenizer with more tokens than the model has embeddings, as if <pad> was added without resizing the model."""

import json

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load

# The tiny tokenizer has ids up to 299.
V = 300


def with_tokens(source, *texts):
    """Return a source's tokenizer.json with added special tokens, whose ids start at V."""
    document = json.loads(source.tokenizer_json)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document["added_tokens"] += [{"id": V + i, "content": text, **flags} for i, text in enumerate(texts)]
    return json.dumps(document).encode()


@pytest.fixture(scope="module")
def padded(export_tiny, tiny_source):
    """Return the tiny model with an embedding for every token except <pad>."""
    source = tiny_source(config={"vocab_size": V})
    data = with_tokens(source, "<pad>")
    return load(
        export_tiny(tiny_source(config={"vocab_size": V}, fields={"tokenizer_json": data}), targets=("cpu",))
    )


def test_texts_without_the_token_are_answered(padded):
    assert padded.tokenizer.encode("<pad>") == [V]
    found = padded.generate("the quick brown fox", SamplingParams(max_tokens=8, temperature=2.0, seed=1))
    assert all(token < V for token in found.token_ids)


def test_a_text_with_the_token_is_refused_before_the_model_sees_it(padded):
    with pytest.raises(PrecastError) as caught:
        padded.generate("the<pad>cat")
    assert (
        "expected token ids from 0 to 299, found 300 at index 1; leave out '<pad>', for which the model has no"
        " embedding." in str(caught.value)
    )
    with pytest.raises(PrecastError, match=r"expected token ids from 0 to 299, found 301 at index 1\.$"):
        padded.generate([1, 301])


@pytest.mark.parametrize(
    "fields", [{"suppress_tokens": (V,)}, {"begin_suppress_tokens": (V,)}, {"bad_words_ids": ((V,), (3, V))}]
)
def test_sampling_may_name_the_token(padded, fields):
    assert padded.generate("the cat", SamplingParams(max_tokens=2, **fields)).token_ids


def test_a_remark_of_the_export_names_the_tokens(tiny_source):
    from precast.exporter import texts

    source = tiny_source(config={"vocab_size": V})
    data = with_tokens(source, *(f"<{i}>" for i in range(9)))
    source = tiny_source(config={"vocab_size": V}, fields={"tokenizer_json": data})
    assert texts.bare_tokens(source, V) == (
        "added tokens with ids of 300 or above have no embedding and are refused in prompts:"
        " '<0>', '<1>', '<2>', '<3>', '<4>', …"
    )
    assert texts.bare_tokens(source, V + 8) == (
        "added tokens with ids of 308 or above have no embedding and are refused in prompts: '<8>'"
    )
    assert texts.bare_tokens(source, V + 9) is None


def test_a_larger_vocabulary_belongs_to_another_model(export_tiny, tiny_source):
    with pytest.raises(
        PrecastError, match="ids up to 299, not counting added tokens, but the model embeds only 299 tokens"
    ):
        export_tiny(tiny_source(config={"vocab_size": V - 1}))
