"""The tokenizer of a Hugging Face directory: tokenizer.json, as changed by the files beside it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precast.loaders.artifact.errors import PrecastError

from ..files import plain_file, read_json
from .settings import check_settings, with_prefix_space
from .tokens import CONFIG, Tokens, read_tokens


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """A tokenizer as an artifact holds it.

    Attributes:
        document: the tokenizer.json, with the tokens that the files beside it define.
        data: the same as bytes; the file's own bytes if nothing changed.
        tokens: the tokens besides the vocabulary.
        remarks: sentences about settings that are left out.
    """

    document: Mapping[str, Any]
    data: bytes
    tokens: Tokens
    remarks: tuple[str, ...]


def read_tokenizer(folder: Path) -> TokenizerFile:
    """Read tokenizer.json and apply the changes of the files beside it.

    Raises:
        PrecastError: it is missing or broken, or a setting cannot be carried over.
    """
    path = folder / "tokenizer.json"
    if not plain_file(path):
        raise PrecastError(
            f"{folder}: expected tokenizer.json, found none; save the tokenizer in its fast form "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))."
        )
    document = read_json(path)
    from tokenizers import Tokenizer

    try:
        library = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower one
        raise PrecastError(
            f"{path}: is not a tokenizer that the tokenizers library reads ({error}); save it again, or "
            "update the library."
        ) from error
    remarks = check_settings(folder / CONFIG, document)
    tokens = read_tokens(folder, document, library)
    changed = with_prefix_space(folder / CONFIG, document) | {"added_tokens": tokens.added}
    if changed == {"added_tokens": [], **document}:
        return TokenizerFile(document=document, data=path.read_bytes(), tokens=tokens, remarks=remarks)
    data = json.dumps(changed, ensure_ascii=False, separators=(",", ":")).encode()
    return TokenizerFile(document=changed, data=data, tokens=tokens, remarks=remarks)


def special_tokens(config: Mapping[str, object], tokenizer: TokenizerFile) -> dict[str, str | None]:
    """Text of bos and eos: as the tokenizer's files say, else by the ids in config.json."""
    if tokenizer.tokens.is_named:
        return {key: tokenizer.tokens.named.get(key) for key in ("bos_token", "eos_token")}
    texts = {token_id: text for text, token_id in token_ids(tokenizer.document).items()}
    ids = {key: first(config.get(f"{key}_id")) for key in ("bos_token", "eos_token")}
    return {key: texts.get(number) if isinstance(number, int) else None for key, number in ids.items()}


def token_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json with its id; added tokens go before the model's own."""
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram models list [token, score]
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}


def first(value: object) -> object:
    """The first of a list, or the value itself."""
    return value[0] if isinstance(value, list) and value else value
