"""The grammars of a model's constraints, built by llguidance.

Building a grammar usually takes milliseconds. The limits of `constraint_texts` and of llguidance bound this time.
"""

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..artifact.errors import PrecastError
from ..text.tokenizer_library import encode_ids
from ..text.vocabulary_bytes import SPECIAL, drops_first_space, vocabulary_bytes
from .constraint_texts import STRICT, TOOL_CHOICE, ConstraintText, fewer_tools, parts
from .constraints import Constraint, compute_mask, first_line
from .schema_levels import levels

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from tokenizers import Tokenizer as LibraryTokenizer

    from ..text.tokenizer import Tokenizer

# Levels for which JSON may be indented if its schema spells out fewer, and the widest indent of a level.
_LEAST_LEVELS, _INDENT = 8, 4
# Regular expressions of tokens whose masks are computed together, inside strings of JSON. llguidance's own list begins
# with whitespace, which saves no time, but takes 20 ms to prepare.
_SLICES = tuple(r'[^"\\\x00-\x1F\x7F]' + most for most in ("{1,10}", "{1,30}", "+"))
_PAUSE_S = 0.005
_MOST_LEXER_STATES = 50_000  # each state takes up to 2 KB
_MOST_GRAMMARS = 32
# Maximum number of grammars that are built at the same time. Building one may take a few hundred megabytes.
_MOST_BUILDERS = 4
# Maximum number of seconds to search for the part of a schema that llguidance refuses.
_SEARCH_S = 0.5
# llguidance follows references and rules by recursion. A constraint can contain 3,000 references and rules, and each
# needs up to 16 KB of stack.
_STACK_BYTES = 256 << 20
# The lock for changing the stack size of new threads, which is a setting of the whole process.
_STACK_SIZE = threading.Lock()


class Grammars:
    """A thread-safe cache of one model's grammars.

    The cache contains the most recently used grammars. The vocabulary is read when the first constraint starts, and
    belongs to the tokenizer.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: V, the length of the logits.
        end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int, end_ids: Iterable[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._end_ids = sorted(token for token in end_ids if token < vocab_size)
        self._lock = threading.Lock()  # never held while a grammar is built
        self._kept: OrderedDict[ConstraintText, _Grammar] = OrderedDict()
        self._building: dict[ConstraintText, _Result] = {}
        self._builders = threading.BoundedSemaphore(_MOST_BUILDERS)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="precast-constraints")

    def start(self, text: ConstraintText) -> Constraint:
        """Return a constraint for a new answer.

        Several threads may build different grammars at the same time. If two threads need the same grammar, one of them
        builds the grammar, and the other one waits for it.

        Raises:
            PrecastError: the extra `grammar` is not installed, the model has no end token, the tokenizer's decoder is
                not supported, or the constraint is invalid or exceeds llguidance's limits.
        """
        matcher, mask = self._grammar(text)
        return Constraint(matcher.deep_copy(), mask, name=text.kind, worker=self._worker)

    def _grammar(self, text: ConstraintText) -> "_Grammar":
        while True:
            with self._lock:
                if (kept := self._kept.get(text)) is not None:
                    self._kept.move_to_end(text)
                    return kept
                others = self._building.get(text)
            result: _Result = Future() if others is None else others
            if others is None:
                _start_with_deep_stack(partial(self._build, text, result))
            built = result.result()
            if isinstance(built, PrecastError):
                raise PrecastError(str(built))  # a new exception, because threads must not share a traceback
            if isinstance(built, _Grammar):
                return built
            if built is not None and others is None:
                raise built
            # Another thread failed to build the grammar, for instance because of a lack of memory, so try again.

    def _build(self, text: ConstraintText, result: "_Result") -> None:
        """Build a grammar, and set the result.

        This method runs in a separate thread, because Ctrl-C interrupts only the main thread.

        Args:
            text: the constraint.
            result: a future, which always receives the grammar, the error, or None. None means that another thread was
                building the grammar, and failed with an error other than PrecastError.
        """
        with self._lock:
            if (kept := self._kept.get(text)) is not None:
                result.set_result(kept)
                return
            first = self._building.setdefault(text, result)
        if first is not result:  # another thread began first
            first.add_done_callback(lambda done: result.set_result(_shared(done.result())))
            return
        built: _Grammar | BaseException
        try:
            with self._builders:
                built = self._compile(text)
        except BaseException as error:
            built = error
        with self._lock:
            if isinstance(built, _Grammar):
                self._kept[text] = built
                if len(self._kept) > _MOST_GRAMMARS:
                    self._kept.popitem(last=False)
            del self._building[text]
        result.set_result(built)

    def _compile(self, text: ConstraintText) -> "_Grammar":
        key = ("llguidance", self._vocab_size, tuple(self._end_ids))
        vocabulary = self._tokenizer.derive(key, self._read_vocabulary)
        llguidance = _library()
        limits = llguidance.LLParserLimits(max_lexer_states=_MOST_LEXER_STATES, verbose_errors=False)
        bodies = _bodies(text)

        def begin(opening: str, reasoning: str = "") -> "_Grammar":
            program = _program(bodies, opening, reasoning)
            matcher = llguidance.LLMatcher(vocabulary.library, program, log_level=0, limits=limits)
            return _Grammar(matcher, compute_mask(matcher, -(-self._vocab_size // 32)))

        opening, found = "", begin("")
        # If the decoder drops the space at the start of a text, the grammar must begin with that space. A grammar that
        # may begin with a special token is an exception, because no space precedes a special token.
        if vocabulary.opening and not found.matcher.is_error() and not vocabulary.allows_special(found.mask):
            opening = vocabulary.opening
            found = begin(opening)
        if text.reasoning and not found.matcher.is_error():
            found = begin(opening, text.reasoning)
        if found.matcher.is_error():
            reason = found.matcher.get_error()
            unsatisfiable = "NoExtension" in reason
            raise _refusal(text, "no text satisfies it" if unsatisfiable else reason, limits)
        return found

    def _read_vocabulary(self) -> "_Vocabulary":
        if not self._end_ids:
            raise PrecastError(
                "A constrained answer needs an end token, and this model has none; generate without a constraint."
            )
        tokens = vocabulary_bytes(self._tokenizer, self._vocab_size)
        given = _Tokens(tokens, self._end_ids[0], self._tokenizer.library)
        special = [token for token, data in enumerate(tokens) if data.startswith(SPECIAL)]
        # Two calls, because each holds Python's lock: for 55 and 75 ms with 49,152 tokens. The pause gives other
        # threads time to run.
        library = _library().LLTokenizer(given, eos_token=self._end_ids, slices=[])
        time.sleep(_PAUSE_S)
        return _Vocabulary(
            library=library.with_slices(list(_SLICES)),
            opening='" "' if drops_first_space(self._tokenizer, tokens) else "",
            special=frozenset(special) - frozenset(self._end_ids),
        )


class _Grammar(NamedTuple):
    """A parser in its initial state, which is copied for each answer, and the mask for the first token."""

    matcher: "LLMatcher"
    mask: np.ndarray


_Result = Future[_Grammar | BaseException | None]


class _Vocabulary(NamedTuple):
    """A model's vocabulary.

    Attributes:
        library: the vocabulary in llguidance's form.
        opening: a space in Lark's syntax if the decoder drops the space at the start of a text; empty otherwise.
        special: special tokens except the end tokens.
    """

    library: "LLTokenizer"
    opening: str
    special: frozenset[int]

    def allows_special(self, mask: np.ndarray) -> bool:
        """Return True if a mask allows a special token that does not end the answer."""
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        return not self.special.isdisjoint(allowed.tolist())


class _Tokens:
    """A vocabulary in the form that llguidance requires."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokens: list[bytes], eos_token_id: int, tokenizer: "LibraryTokenizer") -> None:
        self.tokens, self.eos_token_id, self._tokenizer = tokens, eos_token_id, tokenizer

    def __call__(self, text: str) -> list[int]:
        return encode_ids(self._tokenizer, text, add_special_tokens=False)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise PrecastError(
            "constraints need llguidance, which is not installed: pip install 'precast[grammar]'"
        ) from None
    return llguidance


def _shared(built: "_Grammar | BaseException | None") -> "_Grammar | PrecastError | None":
    """Return what the threads that waited for this build receive: its result, or None if they must build again."""
    return built if isinstance(built, _Grammar | PrecastError) else None


def _start_with_deep_stack(call: Callable[[], None]) -> None:
    """Call a function in a new thread whose stack allows deep recursion."""
    thread = threading.Thread(target=call, daemon=True)
    with _STACK_SIZE:
        before = threading.stack_size()
        try:
            threading.stack_size(_STACK_BYTES)
            thread.start()
        finally:
            threading.stack_size(before)


# --- texts for llguidance -----------------------------------------------------------------------------------


def _bodies(text: ConstraintText) -> dict[str, dict[str, Any]]:
    """Return a constraint's grammars in llguidance's form, by name; the first grammar describes the whole answer."""
    schemas = (json.loads(schema.text) for schema in text.schemas)
    return {"body": _body(text), **{f"arguments_{n}": _json_body(schema) for n, schema in enumerate(schemas)}}


def _body(text: ConstraintText) -> dict[str, Any]:
    """Return a constraint's grammar in llguidance's form, without the schemas of tools."""
    if text.kind == "json_schema":
        return _json_body(json.loads(str(text.value)))
    if text.kind == "regex":
        (grammar,) = json.loads(_library().LLMatcher.grammar_from_regex(text.value))["grammars"]
        return {"lark_grammar": grammar["lark_grammar"]}
    if text.kind == "choice":
        # CHOICE is a terminal, because in a rule, each choice would be a separate item of the parser.
        choices = " | ".join(json.dumps(choice) for choice in text.value)
        return {"lark_grammar": f"start: CHOICE\nCHOICE: {choices}"}
    return {"lark_grammar": text.value}


def _json_body(schema: dict[str, Any]) -> dict[str, Any]:
    options = schema.get("x-guidance", {})
    if not {"whitespace_flexible", "whitespace_pattern"} & options.keys():
        options = {"whitespace_pattern": _whitespace(levels(schema)), **options}
    return {"json_schema": {**schema, "x-guidance": options}}


def _whitespace(depth: int) -> str:
    """Return the regular expression of whitespace between two parts of JSON: a space, or a line feed and an indent.

    If more were allowed, small models would repeat line feeds.
    """
    most = max(depth, _LEAST_LEVELS)
    return rf"\x20|\x0A(?:\x20{{0,{_INDENT * most}}}|\x09{{0,{most}}})"


def _program(bodies: Mapping[str, dict[str, Any]], opening: str, reasoning: str = "") -> str:
    """Return a grammar that accepts the reasoning, the opening and the body in this order, in any tokenisation.

    Args:
        bodies: the result of `_bodies`.
        opening: the text before the body, in Lark's syntax.
        reasoning: the rules of `reasoning_grammar`; empty for an answer without reasoning.
    """
    # With no_forcing, the model may choose any tokens that spell a required text. Otherwise, llguidance would let the
    # tokenizer choose the tokens.
    lines = ['%llguidance {"no_forcing": true}', f"start: {opening} @body"]
    if reasoning:
        space = opening or json.dumps("")
        lines[1:] = ["start: reasoned", f"space: {space}", "answer: @body", reasoning]
    named = [{"name": name, **body} for name, body in bodies.items()]
    return json.dumps({"grammars": [{"name": "start", "lark_grammar": "\n".join(lines)}, *named]})


# --- refusals -----------------------------------------------------------------------------------------------


def _refusal(text: ConstraintText, reason: str, limits: "LLParserLimits") -> PrecastError:
    """Return the error for a constraint that llguidance refuses."""
    if text.kind == "json_schema":
        return _schema_refusal(text.kind, json.loads(str(text.value)), reason, limits)
    if text.kind in (TOOL_CHOICE, STRICT):
        return _tool_refusal(text, reason, limits)
    cause = first_line(_cause(reason))
    if text.kind == "regex":
        expected, remedy = "a regular expression in Rust's syntax", "change the expression"
    elif text.kind == "choice":
        expected, remedy = "choices", "give fewer choices"
    else:
        expected, remedy = "a Lark grammar", "change the grammar"
        if place := re.match(r"(?:at )?(\d+)\((\d+)\): ", cause):
            cause = f"{cause[place.end() :]} (line {place[1]}, column {place[2]})"
    return PrecastError(
        f"{text.kind}: expected {expected} within llguidance's limits, found: {cause}; {remedy}."
    )


def _tool_refusal(text: ConstraintText, reason: str, limits: "LLParserLimits") -> PrecastError:
    validate = _library().LLMatcher.validate_grammar
    for where, schema_text in text.schemas:
        schema = json.loads(schema_text)
        if own := validate(_program({"body": _json_body(schema)}, ""), limits=limits):
            return _schema_refusal(where, schema, own, limits)
    return PrecastError(
        f"tools: expected parameters that llguidance can enforce together, found: {first_line(reason)};"
        f" {fewer_tools(text.kind)}."
    )


def _schema_refusal(
    where: str, schema: dict[str, Any], reason: str, limits: "LLParserLimits"
) -> PrecastError:
    part = _refused_part(schema, reason, limits)
    return PrecastError(
        f"{where}{part}: expected a schema that llguidance can enforce, found: {first_line(_cause(reason))};"
        " change the schema."
    )


def _cause(reason: str) -> str:
    """Return the regex parser's message if the reason contains one, otherwise the whole reason."""
    found = re.search(r"^error: (.*)$", reason, re.MULTILINE)
    return f"a regular expression with an error: {found[1]}" if found else reason


def _refused_part(schema: dict[str, Any], reason: str, limits: "LLParserLimits") -> str:
    """Return " at POINTER" for the innermost part that llguidance refuses for this reason; "" for the whole schema."""
    matcher, until = _library().LLMatcher, time.monotonic() + _SEARCH_S
    shared: dict[str, Any] = {
        key: schema[key] for key in ("$schema", "$defs", "definitions") if key in schema
    }
    # In reverse order, inner parts come before the parts that contain them.
    for pointer, part in reversed(list(parts(schema))):
        if not pointer or time.monotonic() > until:
            break
        if (
            matcher.validate_grammar(_program({"body": _json_body({**shared, **part})}, ""), limits=limits)
            == reason
        ):
            return f" at {pointer}"
    return ""
