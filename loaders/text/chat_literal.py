"""Encode the messages of a chat as plain text, so that special-token text in a message cannot forge a turn.

A control token is a special token, or an added token whose spelling occurs in the template or has the form `<|…|>`.

1. A marker, which is a Unicode noncharacter, is inserted into each spelling of a control token in the caller's values.
   Then the template is rendered.
2. The tokenizer encodes the rendered prompt. It finds only the control tokens that the template wrote. Each of them is
   replaced with a stand-in, which is a random string.
3. The markers are removed, and a second tokenizer encodes the text. This tokenizer has a token for each stand-in, and
   treats control tokens as plain text. Text between two control tokens gets the same ids as in the ordinary encoding.
4. In the result, the id of each stand-in is replaced with the id of its control token.

If the caller's values contain no spelling of a control token, the prompt is encoded in the ordinary way.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..artifact.errors import PrecastError
from .tokenizer_library import encode, encode_ids

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as LibraryTokenizer

_Flags = tuple[bool, bool, bool]  # lstrip, rstrip, normalized

# Unicode reserves noncharacters for a program's internal use.
_MARKERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# The usual spelling of control tokens; some tokenizers do not flag them as special.
_SPELLING = re.compile(r"<[|｜].+[|｜]>")


class LiteralChat:
    """An encoder for prompts of one chat template that encodes the caller's values as plain text.

    Args:
        library: the tokenizer, which stays unchanged.
        template: source of the template. An added token that occurs in it is a control token, even if the token is not
            special.
    """

    def __init__(self, library: "LibraryTokenizer", template: str) -> None:
        self._library = library
        self._template = template
        added = library.get_added_tokens_decoder()
        self._control = {number: token for number, token in added.items() if _is_control(token, template)}
        self._all_texts = _TokenTexts([token.content for token in self._control.values()])
        self._special_texts = _TokenTexts(
            [token.content for token in self._control.values() if token.special]
        )

    @cached_property
    def _literal(self) -> "tuple[LibraryTokenizer, dict[_Flags, str]]":
        return _literal_tokenizer(self._library, self._control.values())

    def encode(self, values: Mapping[str, Any], render: Callable[[Mapping[str, Any]], str]) -> list[int]:
        """Return the ids of a prompt.

        Args:
            values: the caller's values for the template, as plain JSON.
            render: function that renders the template.

        Raises:
            PrecastError: `render` or the tokenizer fails, or a text becomes a control token even when encoded as plain
                text.
        """
        if self._split_words:  # few templates have such words
            present = {key: value for key, value in values.items() if value is not None}
            if self._split_words & {*_names(present)} - {"messages"}:
                raise _unsupported()
        marker = self._free_marker(values)
        marked = {**_mark(values, self._all_texts, marker), "messages": self._mark_messages(values, marker)}
        # JSON in a prompt may contain the marker as an escape.
        prompt = re.sub(rf"\\u{ord(marker):04x}", marker, render(marked), flags=re.IGNORECASE)
        if marker not in prompt:
            return list(encode(self._library, prompt, add_special_tokens=False).ids)
        return self._encode(prompt, marker)

    @cached_property
    def _split_words(self) -> frozenset[str]:
        """The template's words that a marker would split. A key or role with such a name would no longer match."""
        words = set(re.findall(r"\w+", self._template))
        return frozenset(word for word in words if self._all_texts.mark(word, _MARKERS[0]) != word)

    def _mark_messages(self, values: Mapping[str, Any], marker: str) -> list[Any]:
        """Return the messages with markers.

        In the assistant's messages, only special tokens get a marker. Templates search these messages for other control
        tokens, such as `<think>` and `<tool_call>`.
        """
        return [
            _mark(message, self._special_texts if message["role"] == "assistant" else self._all_texts, marker)
            for message in values["messages"]
        ]

    def _free_marker(self, values: Mapping[str, Any]) -> str:
        """Return a marker that occurs neither in the values nor in the template, not even as a JSON escape."""
        text = (json.dumps(values, ensure_ascii=False) + self._template).lower()
        for marker in _MARKERS:
            if marker not in text and f"\\u{ord(marker):04x}" not in text:
                return marker
        raise PrecastError(
            f"Chat: literal encoding needs one of the {len(_MARKERS)} noncharacters U+FDD0 to U+FDEF as a marker, but"
            " the messages contain all of them; remove one from the messages."
        )

    def _encode(self, prompt: str, marker: str) -> list[int]:
        literal, stand_ins = self._literal
        found = encode(self._library, prompt, add_special_tokens=False)
        pieces, real, end = [], [], 0
        for place, number in enumerate(found.ids):
            if number not in self._control:
                continue
            # All offsets would take a tenth of a second for a megabyte.
            start, stop = found.token_to_chars(place) or found.offsets[place]
            if self._is_real(prompt, start, stop, number, marker):
                token = self._control[number]
                name, whole = stand_ins[_flags(token)], prompt[start:stop]
                # Keep the spaces that the token absorbs, because its stand-in absorbs them, too.
                stand_in = whole.replace(token.content, name, 1) if token.content in whole else name
                pieces += [prompt[end:start], stand_in]
                real.append(number)
                end = stop
        text = "".join([*pieces, prompt[end:]]).replace(marker, "")
        return self._restore(encode_ids(literal, text, add_special_tokens=False), real, text)

    def _is_real(self, prompt: str, start: int, stop: int, number: int, marker: str) -> bool:
        """Return True if the template wrote the control token.

        The unknown token is also a control token. The tokenizer returns it for any character that the vocabulary lacks,
        so the text in the prompt must equal the token's spelling.
        """
        token, text = self._control[number], prompt[start:stop]
        if marker in text or not (token.normalized or text.strip() == token.content.strip()):
            return False
        # A marker cannot split a token of one character, so `mark` inserts a marker before it and a marker after it.
        return len(token.content) > 1 or prompt[max(start - 1, 0) : stop + 1] != f"{marker}{text}{marker}"

    def _restore(self, ids: Sequence[int], real: Sequence[int], text: str) -> list[int]:
        """Replace the stand-ins in `ids` with the control tokens in `real`, in order."""
        literal, names = self._literal
        stand_ins = {literal.token_to_id(name) for name in names.values()}
        if sum(number in stand_ins for number in ids) != len(real):
            raise _unsupported()
        plain = text.lower()
        for number in set(ids) & self._control.keys():
            # The unknown token is also a control token. It is valid for a character that the vocabulary lacks, and
            # wrong only if the text contains the token's spelling.
            if (content := self._control[number].content).lower() in plain:
                raise PrecastError(
                    f"Chat: the text {content!r} cannot be encoded literally, because it is also an ordinary token of"
                    " the vocabulary; remove it from the messages."
                )
        remaining = iter(real)
        return [next(remaining) if number in stand_ins else number for number in ids]


class _TokenTexts:
    """The spellings of control tokens. Matching ignores case, because a template may apply `lower` to a message."""

    def __init__(self, contents: Sequence[str]) -> None:
        longest_first = sorted(contents, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._start = re.compile(f"(?=({pattern}))", re.IGNORECASE)
        self._begins = {content[:size].lower() for content in contents for size in range(1, len(content))}
        self._ends = {content[size:].lower() for content in contents for size in range(1, len(content))}
        self._sizes = range(1, max(map(len, contents), default=1))

    def mark(self, text: str, marker: str) -> str:
        """Return `text` with a marker inside each spelling, and at each end that a spelling could extend across."""
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
        after = any(text[-size:].lower() in self._begins for size in self._sizes)
        return f"{marker if before else ''}{whole}{marker if after else ''}"


def _unsupported() -> PrecastError:
    return PrecastError("Chat: this tokenizer cannot encode messages literally; turn off the option literal.")


def _names(value: Any) -> Iterator[str]:
    """Yield all keys of the objects in a JSON value, and the roles of messages."""
    if isinstance(value, Mapping):
        yield from value
        if isinstance(role := value.get("role"), str):
            yield role
    if isinstance(value, (list, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _names(item)


def _mark(value: Any, texts: _TokenTexts, marker: str) -> Any:
    """Return a copy of a plain JSON value with markers added to every string, including keys."""
    if isinstance(value, str):
        return texts.mark(value, marker)
    if isinstance(value, list):
        return [_mark(item, texts, marker) for item in value]
    if isinstance(value, Mapping):
        return {texts.mark(key, marker): _mark(item, texts, marker) for key, item in value.items()}
    return value


def _is_control(token: "AddedToken", template: str) -> bool:
    """Return True if a token could forge a turn. An added token that consists of spaces could not."""
    if token.special:
        return True
    looks_like_one = token.content in template or _SPELLING.fullmatch(token.content) is not None
    return looks_like_one and not token.content.isspace()


def _flags(token: "AddedToken") -> _Flags:
    return bool(token.lstrip), bool(token.rstrip), bool(token.normalized)


def _literal_tokenizer(
    library: "LibraryTokenizer", control: Collection["AddedToken"]
) -> tuple["LibraryTokenizer", dict[_Flags, str]]:
    """Return a tokenizer that treats control tokens as text, and the spellings of its stand-ins.

    The tokenizer has one stand-in for each combination of flags among the control tokens.
    """
    from tokenizers import AddedToken, Tokenizer

    literal = Tokenizer.from_str(library.to_str())
    # The spellings are random, so that a caller cannot guess them. They contain no marker.
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
    literal.add_tokens([*copies, *stand_ins])
    literal.encode_special_tokens = True
    return literal, names
