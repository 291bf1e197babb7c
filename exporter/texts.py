"""Check and write an artifact's tokenizer and chat templates."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.text.chat_template import ChatTemplate
from precast.loaders.text.tokenizer import Tokenizer

from .sources.base import Source
from .tokenizer_form import fast_form

TOKENIZER_FILE, TEMPLATE_FILE = "tokenizer.json", "chat_template.jinja"


def read_tokenizer(source: Source) -> Tokenizer:
    """Return the tokenizer of a source, built in the same way as the loader builds an artifact's tokenizer.

    Raises:
        PrecastError: the source's `tokenizer_json` is not a tokenizer, or its decoder cannot decode token by token.
    """
    return Tokenizer.from_json(
        source.tokenizer_json,
        chat_template=source.chat_template,
        named_templates=source.named_templates,
        bos_token=source.bos_token,
        eos_token=source.eos_token,
    )


def check_templates(source: Source) -> None:
    """Compile every chat template of a source, so that a broken template fails the export instead of the first chat.

    Raises:
        PrecastError: a template is too long, or its syntax is wrong.
    """
    default = {} if source.chat_template is None else {None: source.chat_template}
    for name, template in (default | dict(source.named_templates)).items():
        try:
            ChatTemplate(template, bos_token=source.bos_token, eos_token=source.eos_token)
        except PrecastError as error:
            which = "chat template" if name is None else f"chat template {name!r}"
            raise PrecastError(
                f"{source.name}: its {which} is unusable ({str(error).rstrip('.')}); correct or remove the template."
            ) from None


# Maximum number of markers or tokens that a remark lists; "…" stands for the rest.
_LISTED = 5

# The usual forms of chat markers, such as <|im_start|>, <start_of_turn> and [INST].
_MARKER = re.compile(r"<[|｜][^\s<>]{1,60}[|｜]>|</?[a-z]+_of_[a-z]+>|\[/?[A-Z_]{2,20}\]")
_SYSTEM, _USER = {"role": "system", "content": "a"}, {"role": "user", "content": "b"}
_SAMPLES = ([_SYSTEM, _USER, {"role": "assistant", "content": "c"}, _USER], [_USER])


def marker_remarks(source: Source) -> tuple[str, ...]:
    """Return a remark if the tokenizer splits a chat marker, such as <|im_start|>, into several tokens.

    A chat marker is usually an added token, and a tokenizer never splits an added token. A marker that is split is
    therefore missing from the added tokens. Some models were trained in this way, so a split marker is not an error.
    The markers are taken from a sample conversation, which is rendered with each template.
    """
    tokenizer = read_tokenizer(source)
    names = [*([] if source.chat_template is None else ["default"]), *source.named_templates]
    markers = sorted({marker for name in names for marker in _MARKER.findall(_sample(tokenizer, name))})
    split = [marker for marker in markers if len(tokenizer.encode(marker, add_special_tokens=False)) != 1]
    if not split:
        return ()
    return (f"the tokenizer splits these markers of the chat template into several tokens: {_listed(split)}",)


def bare_tokens(source: Source, vocab: int) -> str | None:
    """Return a remark on the added tokens that have no embedding, or None if all of them have one.

    transformers loads a model with such tokens, but fails on every text that contains one of them.

    Args:
        source: the source.
        vocab: number of embeddings in the model.
    """
    bare = [f"{token!r:.40}" for token in read_tokenizer(source).tokens_from(vocab)]
    if not bare:
        return None
    return f"added tokens with ids of {vocab} or above have no embedding and are refused in prompts: {_listed(bare)}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", …" if len(names) > _LISTED else "")


def _sample(tokenizer: Tokenizer, template: str) -> str:
    """Return a rendered sample conversation, or "" if the template refuses every sample."""
    for messages in _SAMPLES:
        try:
            return tokenizer.render_chat(messages, template=template)
        except PrecastError:
            continue
    return ""


def named_files(source: Source) -> dict[str, str]:
    """Return a file name for each named template.

    The file name contains the template's name, or a number if that name is unsafe in a file name or already taken.
    """
    files: dict[str, str] = {}
    taken: set[str] = set()
    for number, name in enumerate(source.named_templates, 1):
        own = [name.lower()] if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) else []
        endings = chain(own, map(str, count(number)))
        files[name] = next(
            file for file in (f"chat_template.{ending}.jinja" for ending in endings) if file not in taken
        )
        taken.add(files[name])
    return files


def write_texts(folder: Path, source: Source) -> None:
    """Write the tokenizer and the chat templates of `source` into `folder`."""
    (folder / TOKENIZER_FILE).write_bytes(fast_form(source.tokenizer_json))
    texts: Mapping[str, str] = {
        file: source.named_templates[name] for name, file in named_files(source).items()
    }
    if source.chat_template is not None:
        texts = {TEMPLATE_FILE: source.chat_template, **texts}
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8", newline="")
