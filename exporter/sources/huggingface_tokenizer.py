"""The tokenizer's side of a Hugging Face directory: tokenizer.json, special tokens, chat template."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from precast.loaders.artifact.errors import PrecastError

from .files import read_json, read_text

_CONFIG = "tokenizer_config.json"
# Tokens that transformers hands to chat templates and an artifact does not: the template itself gets their text.
_TEMPLATE_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def optional_json(path: Path) -> dict[str, object]:
    return read_json(path) if path.is_file() else {}


def read_tokenizer(folder: Path) -> dict[str, object]:
    """tokenizer.json, when the tokenizers library reads it too."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise PrecastError(
            f"{folder}: expected tokenizer.json, found none; save the tokenizer in its fast form "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))."
        )
    if optional_json(folder / _CONFIG).get("auto_map") is not None:
        raise PrecastError(
            f"{folder / _CONFIG}: auto_map asks for Python code that came with the checkpoint, which is never run;"
            " remove it where tokenizer.json alone does the same."
        )
    document = read_json(path)
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower one
        raise PrecastError(
            f"{path}: is not a tokenizer that the tokenizers library reads ({error}); save it again, or "
            "update the library."
        ) from error
    return document


def special_tokens(
    folder: Path, config: Mapping[str, object], tokenizer: Mapping[str, object]
) -> dict[str, str | None]:
    """Text of bos and eos: as the tokenizer's files say, else by the ids in config.json."""
    said = _said_of_tokens(folder)
    if said is None:
        texts: dict[Any, str] = {token_id: text for text, token_id in token_ids(tokenizer).items()}
        said = {key: texts.get(first(config.get(f"{key}_id"))) for key in ("bos_token", "eos_token")}
    return {key: _text(folder, key, said.get(key)) for key in ("bos_token", "eos_token")}


def _said_of_tokens(folder: Path) -> dict[str, object] | None:
    """What the tokenizer's own files say, the newer one first; None where there are none."""
    paths = [folder / _CONFIG, folder / "special_tokens_map.json"]
    if not any(path.is_file() for path in paths):
        return None
    return {key: value for path in reversed(paths) for key, value in optional_json(path).items()}


def _text(folder: Path, key: str, token: object) -> str | None:
    """A special token is written as its text, or as an object with its text in `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise PrecastError(f"{folder / _CONFIG}: expected {key} to be text, found {token!r}; correct it.")
    return content


def token_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json with its id; added tokens go before the model's own."""
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram models list [token, score]
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}


def first(value: object) -> object:
    """The first of a list, or the value itself."""
    return value[0] if isinstance(value, list) and value else value


def eos_token_ids(
    folder: Path,
    generation: Mapping[str, object],
    config: Mapping[str, object],
    tokenizer: Mapping[str, object],
    eos_token: str | None,
) -> tuple[int, ...]:
    """Where generation stops: generation_config.json's word, else config.json's, else the tokenizer's."""
    by_text = token_ids(tokenizer).get(eos_token) if eos_token is not None else None
    for said in (generation.get("eos_token_id"), config.get("eos_token_id"), by_text):
        if said is None:
            continue
        ids = said if isinstance(said, list) else [said]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise PrecastError(
                f"{folder}: expected eos_token_id to be token ids, found {said!r}; correct the config."
            )
        return tuple(dict.fromkeys(ids))
    return ()


def chat_template(folder: Path) -> str | None:
    """The chat template, ready to be rendered with bos and eos alone; None where there is none."""
    template = _written_template(folder)
    return None if template is None else _with_tokens(folder, template)


def _written_template(folder: Path) -> str | None:
    """chat_template.jinja, the newer place, else what tokenizer_config.json has or calls "default"."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    template = optional_json(folder / _CONFIG).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named:
            raise PrecastError(
                f"{folder / _CONFIG}: expected a chat template named default, found "
                f"{', '.join(map(str, named)) or 'none'}; write the wanted one to chat_template.jinja."
            )
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise PrecastError(
            f"{folder / _CONFIG}: expected chat_template to be text, found "
            f"{type(template).__name__}; write the template to chat_template.jinja."
        )
    return template


def _with_tokens(folder: Path, template: str) -> str:
    """The template, behind definitions of the special tokens that it names beside bos and eos."""
    said, lines = _said_of_tokens(folder) or {}, []
    for key in _TEMPLATE_TOKENS:
        text = _text(folder, key, said.get(key))
        if text is not None and re.search(rf"\b{key}\b", template):
            # JSON's escapes are Jinja's; the line's end goes with the tag (trim_blocks).
            lines.append(f"{{% set {key} = {json.dumps(text, ensure_ascii=False)} %}}\n")
    return "".join([*lines, template])
