"""The tokenizer of an artifact: encoding, decoding token by token, and chat prompts.

`tokenizers` is imported when the first tokenizer is created, and jinja2 at the first chat, because imports delay the
first token.
"""

import codecs
import json
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from ..artifact.errors import PrecastError
from .known_tokenizers import Derived
from .tokenizer_library import check_charsmaps, decode, encode_ids, translate_errors

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as LibraryTokenizer

    from .chat_literal import LiteralChat
    from .chat_messages import ChatOptions
    from .chat_template import ChatTemplate

_Value = TypeVar("_Value")

# SentencePiece's spelling of a byte token. The 256 byte tokens encode text that the vocabulary lacks.
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# Names of the default template and of the template for conversations with tools.
_DEFAULT, _TOOL_USE = "default", "tool_use"
# The library accepts ids of 32 bits.
_ID_LIMIT = 1 << 32

# Types of decoders that can decode a text piece by piece, given the last few pieces as context.
_PIECEWISE = frozenset({"BPEDecoder", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"})


class Tokenizer:
    """The tokenizer of an artifact, created with `Tokenizer.from_json`."""

    def __init__(
        self,
        library: "LibraryTokenizer",
        *,
        chat_template: str | None,
        named_templates: Mapping[str, str],
        bos_token: str | None,
        eos_token: str | None,
        derived: Derived | None = None,
    ) -> None:
        self._library, self._derived = library, derived or Derived()
        self._templates = dict(named_templates)
        if chat_template is not None:
            self._templates[_DEFAULT] = chat_template
        self._compiled: dict[str, ChatTemplate] = {}
        self._literal: dict[str, LiteralChat] = {}
        self._bos_token = bos_token
        self._eos_token = eos_token

    @classmethod
    def from_json(
        cls,
        data: bytes,
        *,
        chat_template: str | None,
        bos_token: str | None,
        eos_token: str | None,
        named_templates: Mapping[str, str] = MappingProxyType({}),
    ) -> "Tokenizer":
        """Create a tokenizer from the bytes of a `tokenizer.json`.

        Args:
            data: the contents of the file, in the format of the `tokenizers` library.
            chat_template: Jinja source of the default template, or None.
            bos_token: text of the beginning-of-sequence token, for the chat template.
            eos_token: text of the end-of-sequence token, for the chat template.
            named_templates: Jinja sources of further templates, by name ("tool_use", "rag").

        Raises:
            PrecastError: `data` is not a tokenizer, or its decoder cannot work token by token.
        """
        import tokenizers

        with translate_errors(
            f"tokenizer.json: expected a tokenizer that tokenizers {tokenizers.__version__} can read"
        ):
            check_charsmaps(data)
            library = tokenizers.Tokenizer.from_buffer(data)
        # A file may contain the truncation and padding settings of the training, which would change prompts.
        library.no_truncation()
        library.no_padding()
        tokenizer = cls(
            library,
            chat_template=chat_template,
            named_templates=named_templates,
            bos_token=bos_token,
            eos_token=eos_token,
        )
        tokenizer._check_decoder()
        return tokenizer

    def with_templates(
        self,
        *,
        chat_template: str | None = None,
        named_templates: Mapping[str, str] = MappingProxyType({}),
        bos_token: str | None = None,
        eos_token: str | None = None,
    ) -> "Tokenizer":
        """Return a tokenizer that shares this one's vocabulary, and has the given templates."""
        return Tokenizer(
            self._library,
            chat_template=chat_template,
            named_templates=named_templates,
            bos_token=bos_token,
            eos_token=eos_token,
            derived=self._derived,
        )

    def derive(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """Return a value made from the vocabulary alone. All tokenizers that share the vocabulary share the value.

        Args:
            key: the value's name, and everything besides the vocabulary that affects the value.
            make: makes the value. The value must not refer to this object, or it would never be freed.
        """
        return self._derived.get(key, make)

    @property
    def library(self) -> "LibraryTokenizer":
        """The tokenizer of the `tokenizers` library."""
        return self._library

    @property
    def vocab_size(self) -> int:
        """The number of tokens, including added tokens. The model's V may be larger because of padding."""
        return self._library.get_vocab_size(with_added_tokens=True)

    @property
    def largest_own_id(self) -> int:
        """The largest id in the vocabulary, excluding added tokens; -1 if the vocabulary is empty."""
        return max(self._library.get_vocab(with_added_tokens=False).values(), default=-1)

    def tokens_from(self, first: int) -> list[str]:
        """Return the spelling of every token with an id of at least `first`, in ascending order of ids."""
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        return sorted((text for text, i in vocabulary.items() if i >= first), key=vocabulary.__getitem__)

    def token(self, token_id: int) -> str | None:
        """Return the spelling of a token, or None if no token has the id."""
        return self._library.id_to_token(token_id) if 0 <= token_id < _ID_LIMIT else None

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token, even a special token, adds to a text; b"" for an id without a token.

        The concatenated bytes of an answer's tokens are the answer in UTF-8. The only exception is the start of a text,
        where some tokenizers drop a space.
        """
        token = self.token(token_id)
        if not token:
            return b""
        if self._is_byte_level:
            return byte_level_bytes(token, byte_alphabet())
        if "ByteFallback" in self._decoder_kinds and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        # Decode the token twice in a row and take the second text, because some decoders drop a space at the start.
        once, twice = (self.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once) :].encode()

    def token_text(self, token_id: int) -> str:
        """Return the bytes of `token_bytes` as text, with U+FFFD in place of an incomplete character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`.

        Encode a rendered chat with ``add_special_tokens=False``, because templates write the beginning-of-sequence
        token themselves.

        Raises:
            PrecastError: the text contains a lone surrogate, which no tokenizer can encode.
        """
        return encode_ids(self._library, text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`. An id without a token, as in a padded vocabulary, has no text.

        Raises:
            PrecastError: an id is negative or exceeds 32 bits.
        """
        try:
            return decode(self._library, list(ids), skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise PrecastError(
                f"Tokenizer: expected token ids from 0 to 2^32 - 1, found {list(ids)}."
            ) from error

    def stream(self, *, skip_special_tokens: bool = True, shown: Iterable[str] = ()) -> "TextStream":
        """Return an incremental decoder for one text, which decodes one token at a time.

        Args:
            skip_special_tokens: leave out special tokens.
            shown: spellings of the special tokens to include even so.
        """
        skipped = self._special_ids if skip_special_tokens else frozenset[int]()
        skipped -= {self._library.token_to_id(token) for token in shown}
        if self._is_byte_level:
            return _ByteLevelStream(self._library, skipped)
        return _PieceStream(self._library, skipped, byte_fallback="ByteFallback" in self._decoder_kinds)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: "ChatOptions | None" = None,
        *,
        template: str | None = None,
    ) -> str:
        """Return the prompt for a conversation, rendered by one of the model's chat templates.

        Args:
            messages: as for `ChatTemplate.render`.
            options: the template's other inputs; None means the defaults.
            template: name of the template. None chooses a template as transformers does: "tool_use" if there are tools
                and the model has a template of that name, otherwise the default template.

        Raises:
            PrecastError: the model has no such template, an argument is malformed, or the template fails.
        """
        return self._template(self._template_name(template, options)).render(messages, options)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: "ChatOptions | None" = None,
        *,
        template: str | None = None,
        literal: bool = False,
    ) -> list[int]:
        """Return the token ids of a conversation.

        Args:
            messages: as for `ChatTemplate.render`.
            options: as for `render_chat`.
            template: as for `render_chat`.
            literal: encode the caller's values as plain text, so that special-token text in a message cannot become a
                special token and forge a turn. The option does not change the ids of messages without such text.

        Raises:
            PrecastError: a text cannot be encoded literally; see also `render_chat` and `encode`.
        """
        name = self._template_name(template, options)
        compiled = self._template(name)
        values = compiled.values(messages, options)
        if literal:
            return self._literal_chat(name).encode(values, compiled.render_values)
        # Templates write the beginning-of-sequence token themselves.
        return self.encode(compiled.render_values(values), add_special_tokens=False)

    def chat_template(self, name: str | None = None, options: "ChatOptions | None" = None) -> str:
        """Return the Jinja source of the template that `render_chat` would choose.

        Raises:
            PrecastError: the model has no such template.
        """
        return self._templates[self._template_name(name, options)]

    def _literal_chat(self, name: str) -> "LiteralChat":
        if name not in self._literal:
            from .chat_literal import LiteralChat

            self._literal[name] = LiteralChat(self._library, self._templates[name])
        return self._literal[name]

    def _template(self, name: str) -> "ChatTemplate":
        if name not in self._compiled:
            from .chat_template import ChatTemplate

            self._compiled[name] = ChatTemplate(
                self._templates[name], bos_token=self._bos_token, eos_token=self._eos_token
            )
        return self._compiled[name]

    def _template_name(self, name: str | None, options: "ChatOptions | None") -> str:
        """Return `name`, or the name of the template that suits `options`.

        Raises:
            PrecastError: the model has no such template.
        """
        if not self._templates:
            raise PrecastError(
                "Chat: this artifact has no chat template, so messages cannot become a prompt;"
                " generate from plain text, or export the model with a template."
            )
        if name is None:
            has_tools = options is not None and options.tools is not None
            name = _TOOL_USE if has_tools and _TOOL_USE in self._templates else _DEFAULT
            reason = "this artifact has no default chat template"
        else:
            reason = f"this artifact has no chat template named {name!r}"
        if name not in self._templates:
            known = ", ".join(sorted(self._templates))
            raise PrecastError(f"Chat: {reason}; choose one of its templates with template=…: {known}.")
        return name

    @cached_property
    def added_tokens(self) -> "Mapping[int, AddedToken]":
        """The added tokens, by id. They are cached, because the library creates new objects at each request."""
        return MappingProxyType(self._library.get_added_tokens_decoder())

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(token_id for token_id, token in self.added_tokens.items() if token.special)

    @cached_property
    def _decoder_kinds(self) -> tuple[str, ...]:
        """The types of the decoder's steps in order, with nested sequences flattened."""
        if self._library.decoder is None:
            return ()
        return tuple(_kinds(json.loads(self._library.decoder.__getstate__())))

    @property
    def _is_byte_level(self) -> bool:
        # Fuse has no effect after ByteLevel, which returns one piece.
        kinds = self._decoder_kinds
        return kinds[:1] == ("ByteLevel",) and set(kinds[1:]) <= {"Fuse"}

    def _check_decoder(self) -> None:
        unknown = [kind for kind in self._decoder_kinds if kind not in _PIECEWISE]
        if unknown and not self._is_byte_level:
            raise PrecastError(
                f"tokenizer.json: the decoder {' + '.join(self._decoder_kinds)} cannot decode token by token"
                f" (expected ByteLevel alone, or any of {', '.join(sorted(_PIECEWISE))}); use a checkpoint with"
                " another tokenizer."
            )


class TextStream:
    """An incremental decoder for one text. The cost of a token is independent of the text's length.

    The concatenated results of `push` equal the result of `Tokenizer.decode` for the same ids, without an incomplete
    character at the end. `finish` returns the rest of that result. There is one exception. If a run of byte tokens is
    not valid UTF-8, SentencePiece replaces *every* character of the run with U+FFFD, but a stream cannot replace the
    characters that it has already returned.
    """

    def __init__(self, library: "LibraryTokenizer", skipped: frozenset[int]) -> None:
        self._library = library
        self._skipped = skipped

    def push(self, token_id: int) -> str:
        """Return the text that this token completes, or "" if a character is still incomplete.

        Raises:
            PrecastError: the id is negative or exceeds 32 bits.
        """
        if token_id in self._skipped:
            return ""
        try:
            token = self._library.id_to_token(token_id)
        except OverflowError as error:
            raise PrecastError(
                f"Tokenizer: expected a token id from 0 to 2^32 - 1, found {token_id}."
            ) from error
        # An id without a token, or with an empty spelling, adds no text.
        return self._push(token_id, token) if token else ""

    def finish(self) -> str:
        """Return the rest of the text: U+FFFD for the bytes of an incomplete character."""
        raise NotImplementedError

    def _push(self, token_id: int, token: str) -> str:
        raise NotImplementedError


class _ByteLevelStream(TextStream):
    """GPT-2's byte-level decoder, which joins the bytes of all tokens and reads them as UTF-8."""

    def __init__(self, library: "LibraryTokenizer", skipped: frozenset[int]) -> None:
        super().__init__(library, skipped)
        self._bytes_of = byte_alphabet()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _push(self, token_id: int, token: str) -> str:
        return self._utf8.decode(byte_level_bytes(token, self._bytes_of))


class _PieceStream(TextStream):
    """A stream for any other decoder. The library decodes each piece together with the two pieces before it.

    Decoders need that context, for example to drop a leading space only at the start of a text. A piece is one token,
    or the byte tokens of one character.
    """

    def __init__(self, library: "LibraryTokenizer", skipped: frozenset[int], *, byte_fallback: bool) -> None:
        super().__init__(library, skipped)
        self._byte_fallback = byte_fallback
        self._context: list[list[int]] = []  # the last two pieces
        self._ids: list[int] = []  # byte tokens of an incomplete character
        self._bytes = b""  # the bytes of these tokens
        self._broken = False  # the current run of byte tokens is no longer valid UTF-8

    def finish(self) -> str:
        return self._end_run()

    def _push(self, token_id: int, token: str) -> str:
        match = BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        if match is None:
            return self._end_run() + self._decode([token_id])
        return self._push_byte(token_id, int(match[1], 16))

    def _push_byte(self, token_id: int, byte: int) -> str:
        if self._broken:
            return "\N{REPLACEMENT CHARACTER}"
        self._ids.append(token_id)
        self._bytes += bytes([byte])
        try:
            self._bytes.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            broken = self._end_run()
            self._broken = True
            return broken
        piece, self._ids, self._bytes = self._ids, [], b""
        return self._decode(piece)

    def _end_run(self) -> str:
        """End a run of byte tokens; return U+FFFD for each byte of an incomplete character, as the library does."""
        broken = "\N{REPLACEMENT CHARACTER}" * len(self._ids)
        if self._ids:
            self._remember(self._ids)
        self._ids, self._bytes, self._broken = [], b"", False
        return broken

    def _decode(self, piece: list[int]) -> str:
        before = [token_id for known in self._context for token_id in known]
        known = decode(self._library, before, skip_special_tokens=False)
        text = decode(self._library, before + piece, skip_special_tokens=False)
        self._remember(piece)
        return text[len(known) :]

    def _remember(self, piece: list[int]) -> None:
        self._context = [*self._context[-1:], piece]


def byte_level_bytes(token: str, alphabet: Mapping[str, int]) -> bytes:
    """Return the bytes of a token of GPT-2's byte-level tokenizers."""
    try:
        return bytes([alphabet[char] for char in token])
    except KeyError:  # an added token, which is plain text
        return token.encode()


@cache
def byte_alphabet() -> dict[str, int]:
    """Return the byte for each character of GPT-2's alphabet (Radford et al., 2019: `bytes_to_unicode`, inverted).

    A printable character of Latin-1 represents the byte of its own code. The characters from U+0100 upwards represent
    the other bytes, in order.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _kinds(decoder: Mapping[str, Any]) -> Iterator[str]:
    """Yield the types of a decoder's steps."""
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _kinds(step)
    else:
        yield decoder["type"]
