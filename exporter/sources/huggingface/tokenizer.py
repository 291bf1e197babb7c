"""Read the tokenizer of a Hugging Face directory: tokenizer.json, modified by the files beside it."""

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
    """The tokenizer.json for an artifact.

    Attributes:
        document: the parsed tokenizer.json, including the tokens that the files beside it define.
        data: the bytes of `document` as JSON; the bytes of the source's own file if nothing was changed.
        tokens: added and special tokens.
        remarks: sentences about ignored settings.
    """

    document: Mapping[str, Any]
    data: bytes
    tokens: Tokens
    remarks: tuple[str, ...]


def read_tokenizer(folder: Path) -> TokenizerFile:
    """Return the tokenizer.json of a directory, with the changes that the files beside it require.

    Raises:
        PrecastError: the file is missing or broken, or a setting cannot be applied.
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
    except Exception as error:  # tokenizers raises no narrower type
        raise PrecastError(
            f"{path}: expected a tokenizer that the tokenizers library can read, found another file ({error}); save it"
            " again, or update the library."
        ) from error
    remarks = check_settings(folder / CONFIG, document)
    tokens = read_tokens(folder, document, library)
    changed = with_prefix_space(folder / CONFIG, document) | {"added_tokens": tokens.added}
    if changed == {"added_tokens": [], **document}:
        return TokenizerFile(document=document, data=path.read_bytes(), tokens=tokens, remarks=remarks)
    data = json.dumps(changed, ensure_ascii=False, separators=(",", ":")).encode()
    return TokenizerFile(document=changed, data=data, tokens=tokens, remarks=remarks)


def special_tokens(config: Mapping[str, object], tokenizer: TokenizerFile) -> dict[str, str | None]:
    """Return the texts of the BOS and EOS tokens from the tokenizer's files, or else from their ids in config.json."""
    if tokenizer.tokens.has_own_files:
        return {key: tokenizer.tokens.named.get(key) for key in ("bos_token", "eos_token")}
    texts = {token_id: text for text, token_id in token_ids(tokenizer.document).items()}
    ids = {key: first(config.get(f"{key}_id")) for key in ("bos_token", "eos_token")}
    return {key: texts.get(number) if isinstance(number, int) else None for key, number in ids.items()}


def token_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Return the id of every token of a tokenizer.json. Added tokens override the vocabulary."""
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # a Unigram model has a list of [token, score], in the order of the ids
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}


def first(value: object) -> object:
    """Return the first element of a list, or any other value itself."""
    return value[0] if isinstance(value, list) and value else value
