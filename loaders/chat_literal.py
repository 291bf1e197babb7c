"""Chats whose messages are text and nothing else: special-token text in a message cannot forge a turn.

Before a template runs, each occurrence of a control token's text in what the caller gave is broken by a marker, a
noncharacter of Unicode. The library then finds in the rendered prompt no control tokens but the template's own. Each of
them is replaced by a stand-in, the markers are removed, and the whole is encoded once more by a tokenizer that knows
the stand-ins and takes control tokens for plain text. So the text between two control tokens gets the ids that it has
in place, and a chat without such text in its messages never comes here.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .artifact.errors import PrecastError
from .tokenizer_library import encoded

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as LibraryTokenizer

_Flags = tuple[bool, bool, bool]  # lstrip, rstrip, normalized

# Noncharacters, which Unicode sets aside for a program's own use.
_MARKERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# How a token that marks something is spelt, whatever its flags say.
_SPELLING = re.compile(r"<[|｜].+[|｜]>")


class LiteralChat:
    """Encodes the chats of one template literally.

    Args:
        library: the tokenizer. It is copied, and the copy changed.
        template: source of the template: added tokens that it writes are control tokens, special or not.
    """

    def __init__(self, library: "LibraryTokenizer", template: str) -> None:
        self._library = library
        self._template = template
        added = library.get_added_tokens_decoder()
        self._control = {number: token for number, token in added.items() if _is_control(token, template)}
        contents = [token.content for token in self._control.values()]
        self._all = _Texts(contents)
        self._special = _Texts([token.content for token in self._control.values() if token.special])

    @cached_property
    def _copy(self) -> "tuple[LibraryTokenizer, dict[_Flags, str]]":
        return _literal_copy(self._library, self._control.values())

    def encode(self, values: Mapping[str, Any], render: Callable[[Mapping[str, Any]], str]) -> list[int]:
        """Return the ids of a prompt.

        Args:
            values: what the caller gives to the template, as plain JSON.
            render: the template.

        Raises:
            PrecastError: as `render` and the tokenizer, and for text that the tokenizer makes a control token of even
                as plain text.
        """
        marker = self._free_marker(values)
        marked = {**_marked(values, self._all, marker), "messages": self._marked_messages(values, marker)}
        # JSON within a prompt may have the marker as an escape.
        prompt = re.sub(rf"\\u{ord(marker):04x}", marker, render(marked), flags=re.IGNORECASE)
        if marker not in prompt:
            return list(encoded(self._library, prompt, add_special_tokens=False).ids)
        return self._encode(prompt, marker)

    def _marked_messages(self, values: Mapping[str, Any], marker: str) -> list[Any]:
        """Messages with markers. The model's own may hold tokens that are not special (`<think>`, `<tool_call>`):
        templates look for them there."""
        return [
            _marked(message, self._special if message["role"] == "assistant" else self._all, marker)
            for message in values["messages"]
        ]

    def _free_marker(self, values: Mapping[str, Any]) -> str:
        """A marker that is in no text at hand, neither itself nor as JSON's escape."""
        text = (json.dumps(values, ensure_ascii=False) + self._template).lower()
        for marker in _MARKERS:
            if marker not in text and f"\\u{ord(marker):04x}" not in text:
                return marker
        raise PrecastError(
            f"Chat: the messages use each of the {len(_MARKERS)} noncharacters U+FDD0 to U+FDEF, one of which literal"
            " content needs; remove one."
        )

    def _encode(self, prompt: str, marker: str) -> list[int]:
        literal, stand_ins = self._copy
        found = encoded(self._library, prompt, add_special_tokens=False)
        pieces, real, end = [], [], 0
        for number, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if number in self._control and self._is_real(prompt, start, stop, number, marker):
                token = self._control[number]
                name, whole = stand_ins[_flags(token)], prompt[start:stop]
                # The spaces that the token takes along stay: so does its stand-in.
                held = whole.replace(token.content, name, 1) if token.content in whole else name
                pieces += [prompt[end:start], held]
                real.append(number)
                end = stop
        text = "".join([*pieces, prompt[end:]]).replace(marker, "")
        return self._with_real(encoded(literal, text, add_special_tokens=False).ids, real, text)

    def _is_real(self, prompt: str, start: int, stop: int, number: int, marker: str) -> bool:
        """Return whether a control token was written by the template; an unknown character may give one, too."""
        token, text = self._control[number], prompt[start:stop]
        if marker in text or not (token.normalized or text.strip() == token.content.strip()):
            return False
        # A token of one character has no inside: it stands between two markers.
        return len(token.content) > 1 or prompt[max(start - 1, 0) : stop + 1] != f"{marker}{text}{marker}"

    def _with_real(self, ids: Sequence[int], real: Sequence[int], text: str) -> list[int]:
        """Put control tokens back for their stand-ins."""
        literal, names = self._copy
        stand_ins = {literal.token_to_id(name) for name in names.values()}
        if sum(number in stand_ins for number in ids) != len(real):
            raise PrecastError("Chat: this tokenizer cannot encode content literally; encode it as it is.")
        plain = text.lower()
        for number in set(ids) & self._control.keys():
            # An unknown character gives a control token as well, but not from its text.
            if (content := self._control[number].content).lower() in plain:
                raise PrecastError(
                    f"Chat: the text {content!r} cannot be encoded literally, as the tokenizer has the token as a"
                    " word, too; remove it from the messages."
                )
        given = iter(real)
        return [next(given) if number in stand_ins else number for number in ids]


class _Texts:
    """The texts of control tokens, ready to be found in others: in any case, for filters such as `lower`."""

    def __init__(self, contents: Sequence[str]) -> None:
        longest_first = sorted(contents, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._start = re.compile(f"(?=({pattern}))", re.IGNORECASE)
        self._begins = {content[:size].lower() for content in contents for size in range(1, len(content))}
        self._ends = {content[size:].lower() for content in contents for size in range(1, len(content))}
        self._sizes = range(1, max(map(len, contents), default=1))

    def marked(self, text: str, marker: str) -> str:
        """Break what a token could be made of: whole texts within, and their parts at both ends."""
        pieces, end = [], 0
        for match in self._start.finditer(text):
            place = match.start() + (len(match[1]) > 1)
            pieces += [text[end:place], marker]
            end = place
            if len(match[1]) == 1:
                pieces += [text[end : end + 1], marker]
                end += 1
        whole = "".join([*pieces, text[end:]])
        before = any(text[:size].lower() in self._ends for size in self._sizes)
        behind = any(text[-size:].lower() in self._begins for size in self._sizes)
        return f"{marker if before else ''}{whole}{marker if behind else ''}"


def _marked(value: Any, texts: _Texts, marker: str) -> Any:
    """A value of plain JSON whose texts are marked, keys included."""
    if isinstance(value, str):
        return texts.marked(value, marker)
    if isinstance(value, list):
        return [_marked(item, texts, marker) for item in value]
    if isinstance(value, Mapping):
        return {texts.marked(key, marker): _marked(item, texts, marker) for key, item in value.items()}
    return value


def _is_control(token: "AddedToken", template: str) -> bool:
    """Return whether a token in a message could forge something; runs of spaces and the like are ordinary text."""
    if token.special:
        return True
    is_marker = token.content in template or _SPELLING.fullmatch(token.content) is not None
    return is_marker and not token.content.isspace()


def _flags(token: "AddedToken") -> _Flags:
    return bool(token.lstrip), bool(token.rstrip), bool(token.normalized)


def _literal_copy(
    library: "LibraryTokenizer", control: Collection["AddedToken"]
) -> tuple["LibraryTokenizer", dict[_Flags, str]]:
    """A tokenizer that takes control tokens for text; and its stand-ins for them, by their flags."""
    from tokenizers import AddedToken, Tokenizer

    made = Tokenizer.from_str(library.to_str())
    # Nobody can write these by guessing, and no marker is in them.
    names = {_flags(token): f"\U0001fffe{secrets.token_hex(16)}\U0001fffe" for token in control}
    copies = [
        AddedToken(
            token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized,
            special=True,
        )
        for token in control
    ]
    stand_ins = [
        AddedToken(name, lstrip=lstrip, rstrip=rstrip, normalized=normalized, special=False)
        for (lstrip, rstrip, normalized), name in names.items()
    ]
    made.add_tokens([*copies, *stand_ins])
    made.encode_special_tokens = True
    return made, names
