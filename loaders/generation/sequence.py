"""One sequence, with its prompt, its generated tokens, and the pieces of text that its reader has not taken yet."""

import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..text.answer_parser import AnswerParser
    from ..text.tokenizer import TextStream
    from .drafts import Drafts
    from .engine import KVCache
    from .logprobs import PromptLogprobs
    from .sampling import Sampler
    from .stopping import StopStrings

# A sequence with this many unread pieces pauses until its reader takes a piece. No sequence pauses while another one
# waits and no slot is free.
UNREAD_PIECES = 64


class Piece(NamedTuple):
    """A generated token, and the text that it completes.

    Attributes:
        token: the token; None for the echo of the prompt, and for text that was held back until the end.
        text: complete characters without any part of a stop string; often empty.
    """

    token: int | None
    text: str


class Batch:
    """The sequences that share a KV cache.

    Attributes:
        cache: the KV cache.
        sequences: the sequence in each slot, [B]; None for a free slot.
        filled: the largest number of positions that an ended sequence has filled in each slot, [B].
    """

    def __init__(self, cache: "KVCache", slots: int) -> None:
        self.cache = cache
        self.sequences: list[TokenSequence | None] = [None] * slots
        self.filled = [0] * slots

    def add(self, sequence: "TokenSequence") -> None:
        """Put a sequence into a free slot."""
        sequence.batch, sequence.slot = self, self.sequences.index(None)
        self.sequences[sequence.slot] = sequence

    def remove(self, sequence: "TokenSequence") -> None:
        """Free a sequence's slot, and record the number of positions that the sequence has filled."""
        filled = max(sequence.filled, sequence.written)
        self.filled[sequence.slot] = max(self.filled[sequence.slot], filled)
        self.sequences[sequence.slot] = sequence.batch = None

    def running(self) -> "list[TokenSequence]":
        """Return the sequences that occupy a slot."""
        return [s for s in self.sequences if s is not None]

    def decoding(self, *, includes_paused: bool = False) -> "list[TokenSequence]":
        """Return the sequences that have their first token; skip paused sequences unless `includes_paused`."""
        return [s for s in self.running() if s.is_decoding and (includes_paused or not s.is_paused)]


class TokenSequence:
    """One sequence.

    After `submit`, only the scheduler changes a sequence. Other threads may read the attributes, and take pieces from
    `unread`.

    Args:
        prompt: tokens of the prompt, at least one.
        sampler: the sequence's own sampler.
        decoder: the sequence's own decoder from ids to text.
        stops: the sequence's own filter for stop strings.
        ends: ids that end the generation.
        limit: maximum number of tokens to generate, at least 1.
        timeout_s: seconds from submission after which the generation ends; None for no limit.
        most_unread: number of unread pieces at which the sequence pauses; None for no limit. The sequence does not
            pause while another sequence waits and no slot is free.
        echo: text to show before the answer; empty by default.
        prompt_logprobs: the collector of the prompt's log-probabilities; None if they are not asked for.
        wants_drafts: True if the scheduler may guess tokens and verify several at once.
        parser: the parser that splits the answer to a chat, used by the reader alone; None if the whole answer is
            content.
        notify: a function that the computing thread calls after every new piece and at the end of the sequence. The
            function must neither block nor wait for the scheduler. If it raises an exception, only this sequence fails.

    Attributes:
        sampler: the sampler.
        prompt_logprobs: the collector of the prompt's log-probabilities; None if they are not asked for.
        parser: the parser that splits the answer to a chat, used by the reader alone; None if the whole answer is
            content.
        drafts: the sequence's prompt lookup; None before the first lookup.
        tokens: tokens of the prompt and of the answer so far.
        prompt_tokens: length of the prompt.
        unread: pieces that the reader has not taken yet.
        reason: the `finish_reason` of the `Completion`.
        error: the exception that ended the sequence; None if there was none.
        closing: True if the generation must end before its next token. Any thread may request this with
            `Scheduler.cancel`.
        ended: True once the slot is free and no further pieces follow.
        batch: the sequences that share the KV cache; None without a slot.
        slot: the sequence's slot in the KV cache.
        filled: number of positions in the slot that contain keys and values of `tokens`.
        written: number of positions in the slot that calls with drafts have filled, including wrong guesses; 0 without
            drafts.
        cached_tokens: number of tokens of the prompt whose keys and values came from a prefix.
        queue_s: seconds from submission until the reading of the prompt began.
        began: time at which reading the prompt began, in seconds on the scheduler's clock, which stops between steps.
        first: time of the first token, on the same clock.
        last: time of the newest token, on the same clock.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        sampler: "Sampler",
        decoder: "TextStream",
        stops: "StopStrings",
        ends: Set[int],
        limit: int,
        timeout_s: float | None = None,
        most_unread: int | None = UNREAD_PIECES,
        echo: str = "",
        prompt_logprobs: "PromptLogprobs | None" = None,
        wants_drafts: bool = False,
        parser: "AnswerParser | None" = None,
        notify: Callable[[], None] | None = None,
    ) -> None:
        self.tokens, self.prompt_tokens = list(prompt), len(prompt)
        self.sampler, self.timeout_s, self._notify = sampler, timeout_s, notify
        self._decoder, self._stops, self._ends, self._limit = decoder, stops, ends, limit
        # A sequence has at most one piece for each token, one before the first token, and one after the last.
        self._most_unread = limit + 2 if most_unread is None else most_unread
        self.prompt_logprobs, self.wants_drafts = prompt_logprobs, wants_drafts
        self.parser = parser
        self.drafts: Drafts | None = None
        self.unread: deque[Piece] = deque([Piece(None, echo)] if echo else ())
        self.reason, self.error = "unfinished", None  # type: str, BaseException | None
        self.submitted = self.closing = self.ended = False
        self.batch: Batch | None = None
        self.slot = -1
        self.filled = self.written = self.cached_tokens = 0
        self.submitted_at = self.queue_s = self.began = self.first = self.last = 0.0

    @property
    def generated(self) -> int:
        """The number of generated tokens."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def tokens_left(self) -> int:
        """The number of tokens that may still be generated."""
        return self.prompt_tokens + self._limit - len(self.tokens)

    @property
    def is_decoding(self) -> bool:
        """True once the first token of the answer has been computed."""
        return len(self.tokens) > self.prompt_tokens

    @property
    def is_paused(self) -> bool:
        """True if the number of unread pieces has reached its maximum."""
        return len(self.unread) >= self._most_unread

    def has_news(self) -> bool:
        """Return True if the reader can take a piece, or the sequence has ended."""
        return self.ended or len(self.unread) > 0

    @property
    def is_finished(self) -> bool:
        """True if no further token is to be generated."""
        return self.reason != "unfinished"

    def expires_at(self) -> float | None:
        """Return the time of `time.perf_counter` at which the generation must end; None without a time limit."""
        return None if self.timeout_s is None else self.submitted_at + self.timeout_s

    def accept(self, token: int) -> None:
        """Append a token and its text, and set `reason` if the token ends the generation."""
        self.tokens.append(token)
        if token in self._ends:
            self.reason = "stop"
            text = self._tail("")
        else:
            text, stopped = self._stops.push(self._decoder.push(token))
            if stopped:
                self.reason = "stop"
            elif self.generated == self._limit:
                self.reason = "length"
                text = self._tail(text)
        self.unread.append(Piece(token, text))
        self.tell()

    def tell(self) -> None:
        """Call `notify`, if there is one."""
        if self._notify is not None:
            self._notify()

    def cut(self, reason: str) -> None:
        """End the generation with a `finish_reason`, and add the text that was held back to `unread`."""
        self.reason = reason
        if text := self._tail(""):
            self.unread.append(Piece(None, text))

    def _tail(self, text: str) -> str:
        """Return a text followed by all text that is still held back; set `reason` if a stop string is complete."""
        rest, stopped = self._stops.push(self._decoder.finish())
        if stopped:
            self.reason = "stop"
            return text + rest
        return text + rest + self._stops.flush()

    def submit(self) -> None:
        """Mark the sequence as submitted to a scheduler, and record the time."""
        self.submitted, self.submitted_at = True, time.perf_counter()
