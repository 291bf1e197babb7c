"""Read the chat templates of a Hugging Face directory: the default template and the named ones."""

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
# Variables that the artifact's tokenizer passes to every template.
_GIVEN = ("bos_token", "eos_token")


@dataclass(frozen=True, kw_only=True)
class Templates:
    """The chat templates of a model.

    Attributes:
        default: Jinja source of the default template, or None.
        named: Jinja sources of the other templates, by name ("tool_use", "rag").
    """

    default: str | None
    named: Mapping[str, str]


def template_files(folder: Path) -> list[Path]:
    """Return the template files of a directory, in a fixed order."""
    alone = [path for path in (folder / FILE, folder / LEGACY_FILE) if plain_file(path)]
    return [*alone, *sorted((folder / FOLDER).glob("*.jinja"))]


def chat_templates(folder: Path, tokens: Mapping[str, str]) -> Templates:
    """Return a directory's chat templates.

    Template files override tokenizer_config.json, as in transformers. The older chat_template.json is used only if
    there are no other templates. The returned templates define the special tokens that they use, except bos_token and
    eos_token, which the artifact's tokenizer passes to them.

    Args:
        folder: the directory.
        tokens: texts of special tokens, by name ("pad_token").

    Raises:
        PrecastError: a template is not text, or has no name.
    """
    found = _from_files(folder) or _from_config(folder / CONFIG) or _from_config(folder / LEGACY_FILE)
    ready = {name: with_tokens(template, tokens) for name, template in found.items()}
    return Templates(default=ready.pop(DEFAULT, None), named=dict(sorted(ready.items())))


def _from_files(folder: Path) -> dict[str, str]:
    found = {DEFAULT: read_text(folder / FILE)} if plain_file(folder / FILE) else {}
    paths = sorted((folder / FOLDER).glob("*.jinja"))
    return found | {path.name.removesuffix(".jinja"): read_text(path) for path in paths}


def _from_config(path: Path) -> dict[str, str]:
    """Return the templates of the key `chat_template`: one template, or a list of named ones."""
    value = optional_json(path).get("chat_template")
    if value is None:
        return {}
    entries = value if isinstance(value, list) else [{"name": DEFAULT, "template": value}]
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
    """Prepend definitions of the special tokens that a template uses, except BOS and EOS."""
    lines = [
        # A JSON string is also a string in Jinja. trim_blocks removes the line end after the tag.
        f"{{% set {key} = {json.dumps(text, ensure_ascii=False)} %}}\n"
        for key, text in tokens.items()
        if key not in _GIVEN and key.isidentifier() and re.search(rf"\b{re.escape(key)}\b", template)
    ]
    return "".join([*lines, template])
