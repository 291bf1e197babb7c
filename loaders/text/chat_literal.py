"""Encode chats whose messages are plain text: special-token text in a message cannot forge a turn.

Before a template runs, a marker (a Unicode noncharacter) splits each occurrence of a control token's text in the
caller's values. In the rendered prompt the tokenizer then finds only the template's own control tokens. A stand-in
replaces each of these, the markers are removed, and a second tokenizer encodes the result: it knows the stand-ins and
treats control tokens as plain text. So text between two control tokens keeps the ids that it has in context. A chat
without such text in its messages is encoded the ordinary way.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..artifact.errors import PrecastError
from .tokenizer_library import encode

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as LibraryTokenizer

_Flags = tuple[bool, bool, bool]  # lstrip, rstrip, normalized

# Unicode reserves noncharacters for a program's internal use.
_MARKERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# The spelling of marker tokens, whatever their flags say.
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
        self._all = _TokenTexts(contents)
        self._special = _TokenTexts([token.content for token in self._control.values() if token.special])

    @cached_property
    def _copy(self) -> "tuple[LibraryTokenizer, dict[_Flags, str]]":
        return _literal_copy(self._library, self._control.values())

    def encode(self, values: Mapping[str, Any], render: Callable[[Mapping[str, Any]], str]) -> list[int]:
        """Return the ids of a prompt.

        Args:
            values: the caller's values for the template, as plain JSON.
            render: renders the template.

        Raises:
            PrecastError: as `render` and the tokenizer, and for text that becomes a control token even when encoded as
                plain text.
        """
        if self._misread:  # of next to no tokenizer
            given = {key: value for key, value in values.items() if value is not None}
            if self._misread & {*_names(given)} - {"messages"}:
                raise _impossible()
        marker = self._free_marker(values)
        marked = {**_marked(values, self._all, marker), "messages": self._marked_messages(values, marker)}
        # JSON within a prompt may contain the marker as an escape.
        prompt = re.sub(rf"\\u{ord(marker):04x}", marker, render(marked), flags=re.IGNORECASE)
        if marker not in prompt:
            return list(encode(self._library, prompt, add_special_tokens=False).ids)
        return self._encode(prompt, marker)

    @cached_property
    def _misread(self) -> frozenset[str]:
        """Words of the template that a control token is made like: marked, they would not be what it asks for."""
        words = set(re.findall(r"\w+", self._template))
        return frozenset(word for word in words if self._all.marked(word, _MARKERS[0]) != word)

    def _marked_messages(self, values: Mapping[str, Any], marker: str) -> list[Any]:
        """Insert markers into messages. The assistant's messages may keep tokens that are not special (`<think>`,
        `<tool_call>`), because templates look for them there."""
        return [
            _marked(message, self._special if message["role"] == "assistant" else self._all, marker)
            for message in values["messages"]
        ]

    def _free_marker(self, values: Mapping[str, Any]) -> str:
        """Return a marker that no given text contains, directly or as a JSON escape."""
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
        found = encode(self._library, prompt, add_special_tokens=False)
        pieces, real, end = [], [], 0
        for number, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if number in self._control and self._is_real(prompt, start, stop, number, marker):
                token = self._control[number]
                name, whole = stand_ins[_flags(token)], prompt[start:stop]
                # Keep the spaces that the token absorbs: its stand-in absorbs them too.
                held = whole.replace(token.content, name, 1) if token.content in whole else name
                pieces += [prompt[end:start], held]
                real.append(number)
                end = stop
        text = "".join([*pieces, prompt[end:]]).replace(marker, "")
        return self._with_real(encode(literal, text, add_special_tokens=False).ids, real, text)

    def _is_real(self, prompt: str, start: int, stop: int, number: int, marker: str) -> bool:
        """Return True if the template wrote a control token; an unknown character may produce one too."""
        token, text = self._control[number], prompt[start:stop]
        if marker in text or not (token.normalized or text.strip() == token.content.strip()):
            return False
        # A marker cannot split a token of one character, so one stands on either side.
        return len(token.content) > 1 or prompt[max(start - 1, 0) : stop + 1] != f"{marker}{text}{marker}"

    def _with_real(self, ids: Sequence[int], real: Sequence[int], text: str) -> list[int]:
        """Replace stand-ins by their control tokens."""
        literal, names = self._copy
        stand_ins = {literal.token_to_id(name) for name in names.values()}
        if sum(number in stand_ins for number in ids) != len(real):
            raise _impossible()
        plain = text.lower()
        for number in set(ids) & self._control.keys():
            # An unknown character also produces a control token, but not from the token's text.
            if (content := self._control[number].content).lower() in plain:
                raise PrecastError(
                    f"Chat: the text {content!r} cannot be encoded literally, as the tokenizer has the token as a"
                    " word, too; remove it from the messages."
                )
        given = iter(real)
        return [next(given) if number in stand_ins else number for number in ids]


class _TokenTexts:
    """The texts of control tokens, matched regardless of case because of filters such as `lower`."""

    def __init__(self, contents: Sequence[str]) -> None:
        longest_first = sorted(contents, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._start = re.compile(f"(?=({pattern}))", re.IGNORECASE)
        self._begins = {content[:size].lower() for content in contents for size in range(1, len(content))}
        self._ends = {content[size:].lower() for content in contents for size in range(1, len(content))}
        self._sizes = range(1, max(map(len, contents), default=1))

    def marked(self, text: str, marker: str) -> str:
        """Split token texts within a text, and parts of token texts at both of its ends."""
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


def _impossible() -> PrecastError:
    return PrecastError("Chat: this tokenizer cannot encode content literally; encode it as it is.")


def _names(value: Any) -> Iterator[str]:
    """Yield the keys of plain JSON, and the roles of messages."""
    if isinstance(value, Mapping):
        yield from value
        if isinstance(role := value.get("role"), str):
            yield role
    if isinstance(value, (list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _names(item)


def _marked(value: Any, texts: _TokenTexts, marker: str) -> Any:
    """Return a plain JSON value with markers in all texts, keys included."""
    if isinstance(value, str):
        return texts.marked(value, marker)
    if isinstance(value, list):
        return [_marked(item, texts, marker) for item in value]
    if isinstance(value, Mapping):
        return {texts.marked(key, marker): _marked(item, texts, marker) for key, item in value.items()}
    return value


def _is_control(token: "AddedToken", template: str) -> bool:
    """Return True for a token that could forge structure; runs of spaces and the like are ordinary text."""
    if token.special:
        return True
    is_marker = token.content in template or _SPELLING.fullmatch(token.content) is not None
    return is_marker and not token.content.isspace()


def _flags(token: "AddedToken") -> _Flags:
    return bool(token.lstrip), bool(token.rstrip), bool(token.normalized)


def _literal_copy(
    library: "LibraryTokenizer", control: Collection["AddedToken"]
) -> tuple["LibraryTokenizer", dict[_Flags, str]]:
    """Make a tokenizer that treats control tokens as text; return it with its stand-ins for them, by their flags."""
    from tokenizers import AddedToken, Tokenizer

    made = Tokenizer.from_str(library.to_str())
    # These cannot be guessed, and contain no marker.
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
