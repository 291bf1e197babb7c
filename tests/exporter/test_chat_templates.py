"""Chat templates of a source: the files that contain them, and the template that the artifact's tokenizer uses."""

import json
from typing import Any

import pytest

from precast.exporter import texts
from precast.exporter.sources.base import Source
from precast.exporter.sources.huggingface.templates import chat_templates
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.text.chat_template import ChatOptions, ChatTemplate

USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
FOLDER = "additional_chat_templates"


def listed(**named: str) -> dict[str, Any]:
    return {"chat_template": [{"name": name, "template": template} for name, template in named.items()]}


# The files of a directory, by case.
PLACES: dict[str, dict[str, Any]] = {
    "text": {"tokenizer_config.json": {"chat_template": "old"}},
    "file": {"chat_template.jinja": "new", "tokenizer_config.json": {"chat_template": "old"}},
    "list": {"tokenizer_config.json": listed(default="d", tool_use="t", rag="r")},
    "list of one": {"tokenizer_config.json": listed(default="d")},
    "list without default": {"tokenizer_config.json": listed(rag="r", tool_use="t")},
    "file and list": {"chat_template.jinja": "new", "tokenizer_config.json": listed(tool_use="t")},
    "folder": {"chat_template.jinja": "new", f"{FOLDER}/tool_use.jinja": "t", f"{FOLDER}/rag.jinja": "r"},
    "folder and text": {f"{FOLDER}/rag.jinja": "r", "tokenizer_config.json": {"chat_template": "old"}},
    "default in the folder": {f"{FOLDER}/default.jinja": "f", "chat_template.jinja": "new"},
    "nothing": {},
}


def write(checkpoint: Any, files: dict[str, Any]) -> Any:
    import numpy as np

    texts = {name: content for name, content in files.items() if "/" not in name}
    folder = checkpoint(texts, {"model.embed_tokens.weight": np.zeros((4, 4), np.float32)})
    for name, content in files.items():
        if "/" in name:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("tools", [None, TOOLS, []])
@pytest.mark.parametrize("name", [None, "default", "tool_use", "rag"])
@pytest.mark.parametrize("place", PLACES)
def test_the_choice_of_the_template_equals_that_of_transformers(checkpoint, place, name, tools):
    transformers = pytest.importorskip("transformers")
    folder = write(checkpoint, PLACES[place])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = texts.read_tokenizer(open_source(str(folder)))
    has_named = isinstance(theirs.chat_template, dict)
    if name is None or (has_named and name in theirs.chat_template):
        try:
            expected = theirs.get_chat_template(name, tools)
        except ValueError:
            expected = None
    else:  # transformers treats any other text as a template
        expected = theirs.chat_template if name == "default" and not has_named else None
    if expected is not None:
        assert ours.render_chat(USER, ChatOptions(tools=tools), template=name) == expected
        return
    with pytest.raises(PrecastError, match=r"^Chat: this artifact has no "):
        ours.render_chat(USER, ChatOptions(tools=tools), template=name)


def test_an_unknown_template_name(checkpoint):
    ours = texts.read_tokenizer(open_source(str(write(checkpoint, PLACES["list"]))))
    with pytest.raises(PrecastError) as caught:
        ours.render_chat(USER, template="tools")
    assert str(caught.value) == (
        "Chat: this artifact has no chat template named 'tools'; choose one of its templates with template=…: "
        "default, rag, tool_use."
    )


def test_a_model_without_a_default_template(checkpoint):
    ours = texts.read_tokenizer(open_source(str(write(checkpoint, PLACES["list without default"]))))
    with pytest.raises(PrecastError) as caught:
        ours.render_chat(USER)
    assert str(caught.value) == (
        "Chat: this artifact has no default chat template; choose one of its templates with template=…: rag, tool_use."
    )
    assert ours.render_chat(USER, ChatOptions(tools=TOOLS)) == "t"


def test_chat_template_json_counts_without_other_templates(checkpoint):
    source = open_source(str(write(checkpoint, {"chat_template.json": {"chat_template": "oldest"}})))
    assert source.chat_template == "oldest"
    assert source.files[-1].name == "chat_template.json"


def test_every_template_file_is_hashed(checkpoint):
    files = [file.name for file in open_source(str(write(checkpoint, PLACES["folder"]))).files]
    assert files[-3:] == ["chat_template.jinja", "rag.jinja", "tool_use.jinja"]


@pytest.mark.parametrize("said", [5, ["x"], [{"name": "default"}], [{"name": 1, "template": "t"}]])
def test_a_template_that_is_not_text(checkpoint, said):
    with pytest.raises(PrecastError) as caught:
        open_source(str(write(checkpoint, {"tokenizer_config.json": {"chat_template": said}})))
    assert "expected chat_template to be text, or a list of objects with name and template, found" in str(
        caught.value
    )
    assert str(caught.value).endswith("; write the template to chat_template.jinja.")


def test_a_template_gets_definitions_of_the_special_tokens_that_it_uses(tmp_path):
    awkward = "<p\"a'd\\>é😀"
    tokens = {
        "pad_token": awkward,
        "bos_token": "<s>",
        "unk_token": "<unk>",
        "sep_token": "<sep>",
        "image_token": "<i>",
    }
    body = (
        "\n{{ bos_token }}{{ pad_token }}{{ sep_token }}{{ unk_token_id }}{{ mask_token }}{{ image_token }}"
    )
    (tmp_path / "chat_template.jinja").write_text(body)
    read = chat_templates(tmp_path, tokens | {"not a name": "x"})
    assert read.default is not None
    template = ChatTemplate(read.default, bos_token="<s>", eos_token=None)
    assert template.render([{"role": "user", "content": ""}]) == f"\n<s>{awkward}<sep><i>"
    assert "<unk>" not in read.default


# --- GGUF and the artifact ----------------------------------------------------------------------------------------


def test_named_templates_of_a_gguf_file(tmp_path, gguf_spec):
    metadata = {
        "tokenizer.chat_template": "d",
        "tokenizer.chat_template.tool_use": "t",
        "tokenizer.chat_templates": ["tool_use"],
    }
    source = open_source(str(gguf_spec(metadata=metadata).write(tmp_path)))
    assert (source.chat_template, source.named_templates) == ("d", {"tool_use": "t"})
    assert texts.read_tokenizer(source).render_chat(USER, ChatOptions(tools=TOOLS)) == "t"


def test_a_gguf_template_that_is_not_text(tmp_path, gguf_spec):
    path = gguf_spec(metadata={"tokenizer.chat_template.rag": 5}).write(tmp_path)
    with pytest.raises(
        PrecastError, match=r"expected tokenizer.chat_template.rag to be text, found 5; convert"
    ):
        open_source(str(path))


def source_with(**named: str) -> Source:
    return Source(
        name="m",
        config={},
        tensors={},
        tokenizer_json=b"{}",
        chat_template="default",
        bos_token=None,
        eos_token=None,
        eos_token_ids=(),
        sampling={},
        licence=None,
        files=(),
        named_templates=named,
    )


def test_each_template_gets_a_file(tmp_path):
    said = {"tool_use": "1", "Tool_Use": "2", "../x": "3", "rag": "4", "ä": "5", "8": "6", "7": "7", "ö": "8"}
    source = source_with(**said)
    files = texts.named_files(source)
    assert files == {
        "tool_use": "chat_template.tool_use.jinja",
        "Tool_Use": "chat_template.2.jinja",
        "../x": "chat_template.3.jinja",
        "rag": "chat_template.rag.jinja",
        "ä": "chat_template.5.jinja",
        "8": "chat_template.8.jinja",
        "7": "chat_template.7.jinja",
        "ö": "chat_template.9.jinja",
    }
    texts.write_texts(tmp_path, source)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert {name: written[file] for name, file in files.items()} == source.named_templates
    assert written["chat_template.jinja"] == "default"


def test_an_unusable_named_template():
    with pytest.raises(PrecastError) as caught:
        texts.check_templates(source_with(rag="{% if %}"))
    assert str(caught.value).startswith(
        "m: its chat template 'rag' is unusable (The chat template failed at line 1"
    )
    assert str(caught.value).endswith("; correct or remove the template.")


def test_templates_in_tokenizer_config_json(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(listed(default="d", rag="r")))
    read = chat_templates(tmp_path, {})
    assert (read.default, read.named) == ("d", {"rag": "r"})
