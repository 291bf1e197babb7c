"""The chat templates of a Hugging Face directory: the default one, and those that have a name."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from precast.loaders.artifact.errors import PrecastError

from .files import optional_json, plain_file, read_text
from .huggingface_tokens import CONFIG

DEFAULT = "default"
FILE, LEGACY_FILE, FOLDER = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
# An artifact's tokenizer gives these to a template itself.
_GIVEN = ("bos_token", "eos_token")


@dataclass(frozen=True, kw_only=True)
class Templates:
    """The chat templates of a model.

    Attributes:
        default: the one for any conversation, or None.
        named: the others by name ("tool_use", "rag").
    """

    default: str | None
    named: Mapping[str, str]


def template_files(folder: Path) -> list[Path]:
    """The files of a directory that hold nothing but a template, in a fixed order."""
    alone = [path for path in (folder / FILE, folder / LEGACY_FILE) if plain_file(path)]
    return [*alone, *sorted((folder / FOLDER).glob("*.jinja"))]


def chat_templates(folder: Path, tokens: Mapping[str, str]) -> Templates:
    """Read the chat templates of a directory, ready to be rendered with bos and eos alone.

    Files go before the configuration, as transformers has it: where there is any, tokenizer_config.json's are not
    looked at. The older chat_template.json is taken where nothing else is.

    Args:
        folder: the directory.
        tokens: text of each special token that has a name.

    Raises:
        PrecastError: for a template that is not text, or that has no name.
    """
    found = _of_files(folder) or _of_config(folder / CONFIG) or _of_config(folder / LEGACY_FILE)
    ready = {name: with_tokens(template, tokens) for name, template in found.items()}
    return Templates(default=ready.pop(DEFAULT, None), named=dict(sorted(ready.items())))


def _of_files(folder: Path) -> dict[str, str]:
    found = {DEFAULT: read_text(folder / FILE)} if plain_file(folder / FILE) else {}
    paths = sorted((folder / FOLDER).glob("*.jinja"))
    return found | {path.name.removesuffix(".jinja"): read_text(path) for path in paths}


def _of_config(path: Path) -> dict[str, str]:
    """The value of `chat_template`: text, or a list of named ones."""
    said = optional_json(path).get("chat_template")
    if said is None:
        return {}
    entries = said if isinstance(said, list) else [{"name": DEFAULT, "template": said}]
    found = {}
    for entry in entries:
        name, template = (
            (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, entry)
        )
        if not isinstance(name, str) or not isinstance(template, str):
            raise PrecastError(
                f"{path}: expected chat_template to be text, or a list of objects with name and template, found "
                f"{json.dumps(entry):.80}; write the template to {FILE}."
            )
        found[name] = template
    return found


def with_tokens(template: str, tokens: Mapping[str, str]) -> str:
    """Put definitions of the special tokens that a template names, beside bos and eos, before it."""
    lines = [
        # JSON's escapes are Jinja's; the line's end goes with the tag (trim_blocks).
        f"{{% set {key} = {json.dumps(text, ensure_ascii=False)} %}}\n"
        for key, text in tokens.items()
        if key not in _GIVEN and key.isidentifier() and re.search(rf"\b{re.escape(key)}\b", template)
    ]
    return "".join([*lines, template])
