"""End-of-generation tokens: the same for a GGUF file and for a Hugging Face directory of one model."""

import json

import pytest

from precast.exporter.sources.end_of_generation import _IF_SPECIAL, _UNMISTAKABLE, end_tokens_by_text
from precast.exporter.sources.gguf.generation import end_tokens
from precast.exporter.sources.gguf.markers import mistyped_markers
from precast.exporter.sources.huggingface.source import _end_tokens

# llama.cpp's list (src/llama-vocab.cpp). The last line contains padding tokens, and tokens that separate files; they
# end a generation too.
LLAMA_CPP = """
    <|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|>
    <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜>
    [e~[
    <|fim_pad|> <fim-pad> <PAD> <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <|file_sep|>
""".split()  # fmt: skip
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def as_gguf(tokens, types, **keys):
    named = {f"tokenizer.ggml.{key}_token_id": value for key, value in keys.items()}
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, **named}


def as_hub(tmp_path, tokens, types, config=None, generation=None, eos_token=None):
    added = [
        {"id": i, "content": t}
        for i, (t, kind) in enumerate(zip(tokens, types, strict=True))
        if kind != NORMAL
    ]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    document = {"model": {"vocab": vocabulary}, "added_tokens": added}
    return _end_tokens(tmp_path, generation or {}, config or {}, json.loads(json.dumps(document)), eos_token)


def test_the_list_is_that_of_llama_cpp():
    assert sorted(_UNMISTAKABLE | _IF_SPECIAL) == sorted(LLAMA_CPP)
    assert not _UNMISTAKABLE & _IF_SPECIAL


@pytest.mark.parametrize("text", LLAMA_CPP)
@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED])
def test_one_model_stops_at_the_same_tokens(tmp_path, text, kind):
    tokens, types = ["a", "b", text, "c"], [NORMAL, NORMAL, kind, NORMAL]
    assert end_tokens(as_gguf(tokens, types)) == (2,)
    assert as_hub(tmp_path, tokens, types) == (2,)


@pytest.mark.parametrize("text", LLAMA_CPP)
def test_a_plain_token_ends_a_generation_if_its_text_is_unmistakable(tmp_path, text):
    """Compare both kinds of source. For a GGUF file, the types of chat markers are repaired first."""
    tokens, types = ["a", "b", text, "c"], [NORMAL] * 4
    assert as_hub(tmp_path, tokens, types) == ((2,) if text in _UNMISTAKABLE else ())
    known = text in _UNMISTAKABLE or bool(mistyped_markers(tokens, types, {}))
    assert end_tokens(as_gguf(tokens, types)) == ((2,) if known else ())


def test_an_unused_token_is_no_end():
    assert end_tokens(as_gguf(["a", "<|im_end|>"], [NORMAL, UNUSED])) == ()


def test_a_file_without_types():
    assert end_tokens({"tokenizer.ggml.tokens": ["</s>", "<|im_end|>"]}) == (1,)


def test_named_tokens_go_first(tmp_path):
    tokens, types = ["a", "b", "<|im_end|>", "<|endoftext|>"], [NORMAL, NORMAL, CONTROL, CONTROL]
    assert end_tokens(as_gguf(tokens, types, eos=3, eom=1)) == (3, 1, 2)
    assert as_hub(tmp_path, tokens, types, {"eos_token_id": 3}, {"eos_token_id": [1, 3]}, "a") == (1, 3, 0, 2)
    assert as_hub(tmp_path, tokens, types, {"eos_token_id": 0}, {"eos_token_id": None}, "missing") == (
        0,
        2,
        3,
    )


def test_named_tokens_between_files_count_if_they_exist():
    tokens, types = ["a", "b", "c"], [NORMAL] * 3
    assert end_tokens(as_gguf(tokens, types, eos=2, fim_rep=1, fim_pad=99)) == (2, 1)


def test_a_token_without_an_embedding_is_no_end(tmp_path):
    tokens, types = ["a", "<|im_end|>", "<|endoftext|>"], [NORMAL, CONTROL, CONTROL]
    assert as_hub(tmp_path, tokens, types, {"vocab_size": 2}) == (1,)


@pytest.mark.parametrize(
    ("texts", "ends"),
    [
        # gpt-oss: <|end|> closes one message of an answer.
        (("<|endoftext|>", "<|return|>", "<|end|>", "<|call|>"), ("<|endoftext|>", "<|return|>", "<|call|>")),
        (("<|end|>", "<|flush|>", "<|calls|>"), ("<|flush|>", "<|calls|>")),
        (("<|end|>", "<|return|>"), ("<|end|>", "<|return|>")),
        (("<|endoftext|>", "<|end|>"), ("<|endoftext|>", "<|end|>")),
        (("</s>", "<|tool_response>", "<turn|>"), ("<|tool_response>", "<turn|>")),
        (("</s>",), ("</s>",)),
        (("<|channel|>", "<|message|>", "<|start|>", "<|im_start|>", "<pad>"), ()),
    ],
)
def test_a_token_that_separates_messages_is_no_end(texts, ends):
    ids = {text: number for number, text in enumerate(texts)}
    assert end_tokens_by_text(ids, {}) == tuple(sorted(ids[text] for text in ends))
