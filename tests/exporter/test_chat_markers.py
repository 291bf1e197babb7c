"""Chat markers: each becomes one token, even if a GGUF file declares it as a word; a remark lists all others."""

import dataclasses
import json

import pytest

from precast.exporter import texts
from precast.exporter.sources.gguf.markers import mistyped_markers
from precast.exporter.sources.gguf.vocabulary import TokenType
from precast.exporter.sources.open import open_source

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "the 123"}]


def gguf(tmp_path, gguf_spec, tiny, *, kind: int, template: str | None = CHATML):
    vocabulary = tiny.vocabulary()
    types = [
        kind if token.startswith("<|im_") else old
        for token, old in zip(
            vocabulary["tokenizer.ggml.tokens"], vocabulary["tokenizer.ggml.token_type"], strict=True
        )
    ]
    metadata = {"tokenizer.ggml.token_type": types, "tokenizer.chat_template": template}
    return open_source(str(gguf_spec(metadata=metadata).write(tmp_path)))


@pytest.mark.parametrize("kind", [TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.CONTROL])
def test_markers_of_a_gguf_file_are_one_token_whatever_their_type(tmp_path, gguf_spec, tiny, kind):
    source = gguf(tmp_path, gguf_spec, tiny, kind=int(kind))
    tokenizer = texts.read_tokenizer(source)
    ids = tokenizer.encode(tokenizer.render_chat(CHAT), add_special_tokens=False)
    assert [ids[0], ids.count(1), ids.count(2)] == [1, 2, 1]
    assert "im_" not in tokenizer.decode(ids)
    named = "the GGUF file declares chat markers as words: <|im_start|>, <|im_end|>; each becomes one control"
    assert source.remarks == (() if kind == TokenType.CONTROL else (f"{named} token",))
    assert texts.marker_remarks(source) == ()


def test_known_markers_are_repaired_without_a_template(tmp_path, gguf_spec, tiny):
    source = gguf(tmp_path, gguf_spec, tiny, kind=1, template=None)
    assert texts.read_tokenizer(source).encode("<|im_end|>") == [2]


@pytest.mark.parametrize(
    ("token", "kind", "template", "wrong"),
    [
        ("<|eot_id|>", 1, "", True),
        ("<|eot_id|>", 4, "", True),
        ("<|eot_id|>", 3, "", False),
        ("<|eot_id|>", 5, "", False),
        ("<|odd_mark|>", 1, "", False),
        ("<|odd_mark|>", 1, "{{ '<|odd_mark|>' }}", True),
        ("<|odd_mark|>", 4, "{{ '<|odd_mark|>' }}", False),
        ("[INST]", 1, "[INST] {{ x }} [/INST]", True),
        ("[INST]", 1, "", False),
        ("</s>", 1, "{{ x }}</s>", True),
        ("<｜User｜>", 1, "<｜User｜>{{ x }}", True),
        ("user", 1, "user", False),
        ("<b>", 1, "<b>", False),
    ],
)
def test_mistyped_markers(token, kind, template, wrong):
    for key in ("tokenizer.chat_template", "tokenizer.chat_template.tool_use"):
        assert mistyped_markers(["a", token], [1, kind], {key: template}) == ([1] if wrong else [])


def test_a_remark_names_a_marker_that_is_a_word(tmp_path, gguf_spec, tiny):
    source = gguf(tmp_path, gguf_spec, tiny, kind=3)
    document = json.loads(source.tokenizer_json)
    document["added_tokens"] = [
        token for token in document["added_tokens"] if token["content"] != "<|im_end|>"
    ]
    source = dataclasses.replace(source, tokenizer_json=json.dumps(document).encode())
    assert texts.marker_remarks(source) == (
        "the tokenizer splits these markers of the chat template into several tokens: <|im_end|>",
    )
    named = dataclasses.replace(source, chat_template="{{ messages }}", named_templates={"rag": CHATML})
    assert texts.marker_remarks(named) == texts.marker_remarks(source)


@pytest.mark.parametrize(
    "template",
    [
        "<|odd|>{{ raise_exception('no') }}",
        "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}<|odd|>",
    ],
)
def test_a_template_that_refuses_conversations(tmp_path, gguf_spec, tiny, template):
    source = gguf(tmp_path, gguf_spec, tiny, kind=3, template=template)
    assert bool(texts.marker_remarks(source)) == ("length" in template)


@pytest.mark.parametrize("place", ["added_tokens_decoder", "additional_special_tokens"])
def test_a_rendered_conversation_has_the_ids_of_transformers(tmp_path, place):
    transformers = pytest.importorskip("transformers")
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, "<|im_start|>", "<|im_end|>"])}
    library = Tokenizer(models.BPE(vocabulary, []))
    library.pre_tokenizer, library.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    library.save(str(tmp_path / "tokenizer.json"))
    marks = ["<|im_start|>", "<|im_end|>"]
    said = (
        {str(vocabulary[m]): {"content": m, "special": True} for m in marks} if "decoder" in place else marks
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML, place: said}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"w": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    tokenizer = texts.read_tokenizer(source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(tokenizer.render_chat(CHAT), add_special_tokens=False)
    assert ids == theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert texts.marker_remarks(source) == ()
