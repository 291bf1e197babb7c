"""The chat templates of a Hugging Face directory: the default one and the named ones."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from precast.loaders.artifact.errors import PrecastError

from ..files import optional_json, plain_file, read_text
from .tokens import CONFIG

DEFAULT = "default"
FILE, LEGACY_FILE, FOLDER = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
# An artifact's tokenizer gives these to a template itself.
_GIVEN = ("bos_token", "eos_token")


@dataclass(frozen=True, kw_only=True)
class Templates:
    """The chat templates of a model.

    Attributes:
        default: the default template, or None.
        named: the others by name ("tool_use", "rag").
    """

    default: str | None
    named: Mapping[str, str]


def template_files(folder: Path) -> list[Path]:
    """Return the template files of a directory, in a fixed order."""
    alone = [path for path in (folder / FILE, folder / LEGACY_FILE) if plain_file(path)]
    return [*alone, *sorted((folder / FOLDER).glob("*.jinja"))]


def chat_templates(folder: Path, tokens: Mapping[str, str]) -> Templates:
    """Read the chat templates of a directory; rendering them needs only bos and eos.

    Template files override tokenizer_config.json, as in transformers. The older chat_template.json counts only if
    there is no other template.

    Args:
        folder: the directory.
        tokens: text of each named special token.

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
    """Read the value of `chat_template`: one template, or a list of named ones."""
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
    """Prefix a template with definitions of the special tokens that it names, besides bos and eos."""
    lines = [
        # JSON and Jinja share their escapes. trim_blocks removes the line end after the tag.
        f"{{% set {key} = {json.dumps(text, ensure_ascii=False)} %}}\n"
        for key, text in tokens.items()
        if key not in _GIVEN and key.isidentifier() and re.search(rf"\b{re.escape(key)}\b", template)
    ]
    return "".join([*lines, template])
