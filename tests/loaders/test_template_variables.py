"""Variables of a chat template, given in Python, on the command line, or for a prefix."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import precast
from precast.loaders.add_prefix import PrefixSource, prefix_tokens
from precast.loaders.artifact.errors import PrecastError

USER = {"role": "user", "content": "the cat"}
# A template like that of Qwen 3.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


@pytest.mark.parametrize(("variables", "reasons"), [(None, True), ({"enable_thinking": False}, False)])
def test_the_state_of_the_parser_follows_the_variables(
    scripted_model: Any, variables: dict[str, Any] | None, reasons: bool
) -> None:
    """DeepSeek's templates open the reasoning in the prompt; a prompt may also contain a complete, empty reasoning."""
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}<think>\n"
        "{% if enable_thinking is defined and not enable_thinking %}\n</think>\n\n{% endif %}"
    )
    model = scripted_model("hm</think>yes", template, marks=("<think>", "</think>"))
    found = model.chat([USER], template_variables=variables)
    assert (found.text, found.reasoning) == (("yes", "hm") if reasons else ("hm</think>yes", ""))
    (several,) = model.chat_answers([USER], 1, template_variables=variables)
    ((_, each),) = model.chat_each([[USER]], template_variables=variables)
    assert several.reasoning == each.reasoning == found.reasoning
    assert found.prompt_token_ids == tuple(model.chat_prompt([USER], template_variables=variables))


def test_a_variable_reaches_the_template(scripted_model: Any) -> None:
    model = scripted_model("", TEMPLATE, marks=("<think>", "</think>"))
    ids = model.chat_prompt([USER], template_variables={"enable_thinking": False})
    prompt = model.tokenizer.decode(ids, skip_special_tokens=False)
    assert prompt.rstrip().endswith("<think>\n\n</think>")
    assert ids != model.chat_prompt([USER], template_variables={"enable_thinking": True})


@pytest.mark.parametrize(
    "name", ["messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"]
)
def test_reserved_variables_are_refused_at_once(scripted_model: Any, name: str) -> None:
    model = scripted_model("", TEMPLATE)
    for call in (model.stream_chat, model.chat_prompt, partial(model.chat_each, params=None)):
        with pytest.raises(PrecastError) as error:
            call([USER], template_variables={name: "x"})
        assert str(error.value) == (
            f"Chat: the template variable {name!r} is reserved; choose another name, or use the argument of that name."
        )


def replace_template(artifact: Path, source: str, edit_manifest: Any) -> None:
    (artifact / "chat_template.jinja").write_text(source)
    entry = {"bytes": len(source), "sha256": hashlib.sha256(source.encode()).hexdigest()}
    edit_manifest(artifact, lambda manifest: manifest["files"].update({"chat_template.jinja": entry}))


def test_variables_reach_the_template(record: Any, cli: Any, artifact_copy: Any, edit_manifest: Any) -> None:
    source = "{{ mood }}{{ names | join('+') }}{{ messages[-1].content }}"
    replace_template(artifact_copy, source, edit_manifest)
    options = ("--template-variable", 'mood="a=b"', "--template-variable", "names=[1, 2]")
    found = record(artifact_copy, "-p", "the cat", "-n", "1", "--echo", *options)
    assert found["text"].startswith("a=b1+2the cat")
    assert cli("chat", artifact_copy, "-n", "1", *options, stdin="the dog").exit_code == 0


def test_variables_of_a_batch_are_defaults_for_its_requests(
    cli: Any, artifact_copy: Any, edit_manifest: Any, tmp_path: Path
) -> None:
    replace_template(artifact_copy, "{{ mood }}{{ messages[-1].content }}", edit_manifest)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    own = [{}, {"chat_template_kwargs": {"mood": "the dog sat on "}}, {"chat_template_kwargs": {"other": 1}}]
    source.write_text("".join(json.dumps({"messages": [USER], **each}) + "\n" for each in own))
    given = ("batch", artifact_copy, source, target, "-n", "1")
    assert cli(*given, "--template-variable", 'mood="a "').exit_code == 0
    found = [json.loads(line)["prompt_tokens"] for line in target.read_text().splitlines()]
    encode = precast.load(artifact_copy).tokenizer.encode
    texts = [mood + USER["content"] for mood in ("a ", "the dog sat on ", "a ")]
    assert found == [len(encode(text, add_special_tokens=False)) for text in texts]
    # Records of other variables are not kept.
    assert cli(*given, "--template-variable", 'mood="b "').exit_code == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            ("--ids", "1,2", "--template-variable", "a=1"),
            "--template-variable needs text to format with the chat template",
        ),
        (("-p", "x", "--template-variable", "tools=[]"), "the template variable 'tools' is reserved; choose"),
        (("-p", "x", "--template-variable", "a=b"), "such as enable_thinking=false, found 'a=b'."),
        (("-p", "x", "--template-variable", "a"), "such as enable_thinking=false, found 'a'."),
        (("-p", "x", "--template-variable", "a=" + "[" * 9**5), "such as enable_thinking=false, found 'a=[["),
    ],
)
def test_variables_that_cannot_reach_a_template(
    cli: Any, tiny_artifact: Any, options: Any, text: Any
) -> None:
    result = cli("run", tiny_artifact, *options)
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.split())


def test_variables_of_the_template_are_part_of_a_prefix(scripted_model: Any) -> None:
    model = scripted_model("", "{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}")
    plain, given = (
        prefix_tokens(model, PrefixSource(system="be a cat", template_variables=variables))
        for variables in (None, {"mood": "calm "})
    )
    assert model.tokenizer.decode(given) == "calm " + model.tokenizer.decode(plain)
