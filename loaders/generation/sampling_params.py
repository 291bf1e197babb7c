"""The parameters of generation, checked on construction."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifact.errors import PrecastError
from ..artifact.frozen import Frozen

if TYPE_CHECKING:
    from .constraint_texts import ConstraintText


class SamplingParams(Frozen):
    """The immutable parameters of a generation. Threads may share them.

    By default decoding is greedy, and ends at an end-of-generation token or when the context is full.

    Raises:
        PrecastError: a parameter is unknown, of the wrong type, out of range, or passed by position.
    """

    max_tokens: int | None = None
    """Maximum number of tokens to generate; None generates until the context is full."""
    max_length: int | None = None
    """Maximum length of prompt and answer together, in tokens; ignored if max_tokens is given."""
    min_tokens: int = 0
    """Minimum length of the answer, in tokens; before this length, end-of-generation tokens are forbidden."""
    min_length: int = 0
    """Minimum length of prompt and answer together, in tokens; ignored if min_tokens is above 0."""
    temperature: float = 0.0
    """Divisor of the logits; 0 selects greedy decoding, for which top_k, top_p and min_p have no effect."""
    top_k: int = 0
    """Keep the k most likely tokens, and any tokens tied with the k-th; 0 is off."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens that together reach this probability; 1 is off."""
    min_p: float = 0.0
    """Drop tokens whose probability is below this fraction of the highest probability; 0 is off."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens of the prompt and the answer less likely (CTRL, arXiv:1909.05858); 1 is off."""
    presence_penalty: float = 0.0
    """Number from -2 to 2 to subtract from the logit of every token in the answer so far, as OpenAI does; 0 is off."""
    frequency_penalty: float = 0.0
    """Number from -2 to 2 to subtract from a token's logit for each occurrence in the answer so far; 0 is off."""
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    """Numbers from -100 to 100 to add to logits, by token id; stored as pairs in ascending order of id."""
    no_repeat_ngram_size: int = 0
    """Forbid the repetition of any sequence of this many tokens from the prompt or the answer; 0 is off."""
    suppress_tokens: tuple[int, ...] = ()
    """Tokens that are never chosen."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Tokens that are never chosen as the first token of the answer."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that are never completed; a sequence that is a single end-of-generation token has no effect."""
    bad_words: tuple[str, ...] = ()
    """Words that are never completed. Each word is tokenised twice: at the start of a text, and after a space."""
    seed: int | None = None
    """Seed of the random numbers; None uses fresh entropy."""
    stop: tuple[str, ...] = ()
    """Strings that end generation; they are not part of the answer."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end generation in addition to the model's own end-of-generation tokens, even with ignore_eos."""
    ignore_eos: bool = False
    """Continue after an end-of-generation token."""
    logprobs: int | None = None
    """Return the log-probability of each token of the answer, and of this many most likely tokens at the same position.
    None is off."""
    prompt_logprobs: int | None = None
    """Like `logprobs`, for the tokens of the prompt. The model then reads the whole prompt, without a cached prefix."""
    echo: bool = False
    """Begin the text of the completion with the prompt."""
    prompt_lookup: bool = True
    """Guess the next tokens from earlier text, and verify several at once if that is faster. The answer is the same."""
    timeout_s: float | None = None
    """Time limit in seconds from submission. Generation then ends with the text so far. None is off."""
    json_schema: Mapping[str, Any] | str | None = None
    """JSON Schema of the whole answer, as a mapping or as a string; {"type": "object"} allows any object. Stored as a
    string. This parameter and the next three need the extra `grammar`. At most one of the four can be given."""
    regex: str | None = None
    """Regular expression of the whole answer, in the syntax of Rust's crate regex."""
    grammar: str | None = None
    """Grammar of the whole answer, in llguidance's variant of Lark's syntax."""
    choice: tuple[str, ...] = ()
    """List of strings, one of which is the whole answer."""

    if not TYPE_CHECKING:  # type checkers derive the constructor from the fields

        def __init__(self, /, *values: Any, **fields: Any) -> None:
            _check_names(values, fields)
            super().__init__(**fields)

    def __post_init__(self) -> None:
        checked = self.__dict__
        for name, low in _WHOLE.items():
            if checked[name] is not None or name not in _OPTIONAL:
                checked[name] = _integer(name, checked[name], low=low)
        for name, (smallest, largest) in _REAL.items():
            checked[name] = _real(name, checked[name], low=smallest, high=largest)
        if self.repetition_penalty == 0:
            raise PrecastError("Sampling parameters: repetition_penalty must be greater than 0, found 0.")
        for name in ("ignore_eos", "echo", "prompt_lookup"):
            if not isinstance(checked[name], bool):
                raise PrecastError(
                    f"Sampling parameters: {name} must be true or false, found {checked[name]!r:.60}."
                )
        for name in ("suppress_tokens", "begin_suppress_tokens", "stop_token_ids"):
            checked[name] = _token_ids(name, checked[name])
        checked["bad_words_ids"] = _sequences("bad_words_ids", checked["bad_words_ids"])
        checked["logit_bias"] = _biases(self.logit_bias)
        for name in ("stop", "bad_words"):
            checked[name] = _texts(name, checked[name])
        if self.timeout_s is not None:
            checked["timeout_s"] = _seconds("timeout_s", self.timeout_s)
        self._check_constraint()

    def _check_constraint(self) -> None:
        given = {name: value for name in _CONSTRAINTS if (value := self.__dict__[name]) not in (None, ())}
        if not given:
            return
        # A lazy import, because few answers are constrained.
        from .constraint_texts import checked_constraint

        kind, value, *_ = checked_constraint(given)
        self.__dict__[kind] = value
        if self.ignore_eos:
            raise PrecastError(
                f"Sampling parameters: ignore_eos must be false with {kind}, because only an end token can follow a"
                " complete answer."
            )

    @property
    def constraint(self) -> "ConstraintText | None":
        """The constraint of the answer; None for an unconstrained answer."""
        for name in _CONSTRAINTS:
            if value := self.__dict__[name]:
                from .constraint_texts import ConstraintText

                return ConstraintText(name, value)
        return None

    @property
    def forbids_tokens(self) -> bool:
        """True if any parameter may forbid tokens."""
        return bool(
            self.min_tokens
            or self.min_length
            or self.no_repeat_ngram_size
            or self.suppress_tokens
            or self.begin_suppress_tokens
            or self.bad_words_ids
        )

    @property
    def is_penalised(self) -> bool:
        """True if any parameter changes logits by a bias or a penalty."""
        return bool(
            self.logit_bias or self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        )

    def ends(self, eos_ids: Iterable[int]) -> frozenset[int]:
        """Return the tokens that end the answer, given the model's end-of-generation tokens."""
        return frozenset((*(() if self.ignore_eos else eos_ids), *self.stop_token_ids))

    def with_word_ids(self, encode: Callable[[str], Sequence[int]]) -> "SamplingParams":
        """Return the parameters with `bad_words` tokenised and appended to `bad_words_ids`.

        Each word is forbidden in two tokenisations, as in vLLM: at the start of a text, and after a space. Other
        tokenisations of the word remain possible, as in vLLM and transformers.

        Args:
            encode: a function from a text to its token ids, without special tokens.
        """
        if not self.bad_words:
            return self
        spellings = [text for word in self.bad_words for text in (word.lstrip(), " " + word.lstrip())]
        found = {ids: None for text in spellings if (ids := tuple(encode(text)))}
        return replace(self, bad_words=(), bad_words_ids=(*self.bad_words_ids, *found))

    def for_answers(self, count: int) -> "list[SamplingParams]":
        """Return the parameters of several answers to one prompt, with the seeds `seed`, `seed` + 1, and so on.

        vLLM's `n` uses the same seeds. Without a seed, every answer uses fresh entropy.
        """
        if self.seed is None:
            return [self] * count
        return [replace(self, seed=(self.seed + i) % (1 << 128)) for i in range(count)]

    def limit(self, prompt_tokens: int, room: int) -> int:
        """Return the maximum number of tokens to generate after a prompt.

        Args:
            prompt_tokens: length of the prompt.
            room: number of positions left in the context after the prompt.

        Raises:
            PrecastError: the prompt reaches max_length.
        """
        if self.max_tokens is not None:
            return min(self.max_tokens, room)
        if self.max_length is None:
            return room
        if prompt_tokens >= self.max_length:
            raise PrecastError(
                f"prompt: {prompt_tokens} tokens leave no room in a max_length of {self.max_length}; raise max_length,"
                " or give max_tokens instead."
            )
        return min(self.max_length - prompt_tokens, room)


# The minimum of each integer parameter, and the range of each real parameter. The maximum of an integer is 2^63 - 1, as
# in a manifest. The maximum of the seed is 2^128 - 1, because the state of the random generator has 128 bits.
_WHOLE = {
    "max_tokens": 1,
    "max_length": 1,
    "min_tokens": 0,
    "min_length": 0,
    "top_k": 0,
    "no_repeat_ngram_size": 0,
    "seed": 0,
    "logprobs": 0,
    "prompt_logprobs": 0,
}
_OPTIONAL = ("max_tokens", "max_length", "seed", "logprobs", "prompt_logprobs")
_REAL = {
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, math.inf),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
_BIAS = (-100.0, 100.0)
_LONGEST_S = 10**9
_CONSTRAINTS = ("json_schema", "regex", "grammar", "choice")
_SMALLEST, _LARGEST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


def _check_names(values: tuple[object, ...], fields: Mapping[str, object]) -> None:
    known = SamplingParams.__dataclass_fields__
    if values:
        raise PrecastError(
            "Sampling parameters: expected keyword arguments such as temperature=0.7, found the positional argument"
            f" {values[0]!r:.60}."
        )
    if unknown := sorted(fields.keys() - known.keys()):
        raise PrecastError(
            f"Sampling parameters: found the unknown parameter {unknown[0]!r}; use one of {', '.join(known)}."
        )


def _integer(name: str, value: Any, *, low: int) -> int:
    bits = 128 if name == "seed" else 63
    known = isinstance(value, Integral) and not isinstance(value, bool)
    if not known or not low <= int(value) < 1 << bits:
        raise PrecastError(
            f"Sampling parameters: {name} must be an integer from {low} to 2^{bits} - 1, found {value!r:.60}."
        )
    return int(value)


def _real(name: str, value: Any, *, low: float, high: float) -> float:
    """Return a number as a float, after checking that float32, the type of the logits, can hold it."""
    known = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    value = value.item() if isinstance(value, np.generic) else value
    # Compare before converting, because an int may exceed the range of a float.
    if known and (value == 0 or (low <= value <= min(high, _LARGEST) and abs(value) >= _SMALLEST)):
        return float(value)
    wanted = "of at least 0" if math.isinf(high) else f"between {low:g} and {high:g}"
    if known and low <= value <= high and value < math.inf:
        wanted += f" that float32 can represent: 0, or from {_SMALLEST:.2g} to {_LARGEST:.2g}"
    raise PrecastError(f"Sampling parameters: {name} must be a finite number {wanted}, found {value!r:.60}.")


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    """Return pairs of a token id and its bias, by ascending id. Ids may be given as strings, as in JSON's keys."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, (tuple, list)) or not all(
        isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs
    ):
        raise PrecastError(
            f"Sampling parameters: logit_bias must map token ids to numbers, found {value!r:.60}."
        )
    low, high = _BIAS
    biases = {
        _integer("a token id of logit_bias", int(token) if _is_decimal(token) else token, low=0): _real(
            "a bias of logit_bias", bias, low=low, high=high
        )
        for token, bias in pairs
    }
    return tuple(sorted(biases.items()))


def _is_decimal(token: Any) -> bool:
    return isinstance(token, str) and len(token) < 20 and token.isascii() and token.isdigit()


def _seconds(name: str, value: Any) -> float:
    known = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not known or not 0 < value <= _LONGEST_S:
        raise PrecastError(
            f"Sampling parameters: {name} must be a number above 0 and at most {_LONGEST_S}, found {value!r:.60}."
        )
    return float(value)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise PrecastError(f"Sampling parameters: {name} must be a list of token ids, found {value!r:.60}.")
    return tuple(_integer(f"a token id of {name}", token, low=0) for token in value)


def _sequences(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, (tuple, list)) or not all(
        isinstance(item, (tuple, list)) and item for item in value
    ):
        raise PrecastError(
            f"Sampling parameters: {name} must be a list of non-empty lists of token ids, found {value!r:.60}."
        )
    return tuple(_token_ids(name, item) for item in value)


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(text, str) and text for text in value):
        raise PrecastError(
            f"Sampling parameters: {name} must be a list of non-empty strings, found {value!r:.60}."
        )
    return tuple(value)
