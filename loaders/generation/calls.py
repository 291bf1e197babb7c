"""Call the engine for the sequences of one KV cache, and choose each sequence's next tokens from the results."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .engine import DecodeRow, Engine, StepOutput
from .sequence import Batch, TokenSequence


class Results(NamedTuple):
    """The R results of one call of the engine.

    Attributes:
        tokens: the greedy token of each result, [R].
        logits: the logits of each result, float32 [R, V]; None if every sequence is greedy.
    """

    tokens: list[int]
    logits: np.ndarray | None


def read_chunk(engine: Engine, sequence: TokenSequence, batch: Batch, most: int) -> Results:
    """Run the model on the next tokens of a prompt, and append their keys and values to the sequence's slot.

    Args:
        engine: the engine.
        sequence: the sequence.
        batch: all sequences that share the KV cache.
        most: maximum number of tokens to read; ignored if the prompt's log-probabilities are requested.

    Returns:
        The result for the last of these tokens (R = 1).
    """
    start, slot = sequence.filled, sequence.slot
    if (logprobs := sequence.prompt_logprobs) is None:
        chunk = sequence.tokens[start : min(start + most, sequence.prompt_tokens)]
        step = engine.prefill_chunk(chunk, batch.cache, start=start, slot=slot)
        sequence.filled += len(chunk)
        return _results(engine, step, [sequence])
    # Log-probabilities need the logits after every token. Without a score program, decode one token at a time.
    chunk = sequence.tokens[start : min(start + max(engine.score_tokens, 1), sequence.prompt_tokens)]
    if engine.score_tokens:
        step = engine.score(chunk, batch.cache, start=start, slot=slot)
    else:
        step = engine.decode([DecodeRow(slot, chunk[0], start)], batch.cache)
    logits = engine.logits(step)
    logprobs.add(logits)
    sequence.filled += len(chunk)
    return Results(step.token.tolist()[-1:], logits[-1:])


def decode(engine: Engine, sequences: Sequence[TokenSequence], batch: Batch) -> Results:
    """Run the model on the newest token of each sequence (R = ``len(sequences)``)."""
    rows = [DecodeRow(s.slot, s.tokens[-1], len(s.tokens) - 1) for s in sequences]
    return _results(engine, engine.decode(rows, batch.cache), sequences)


def verify(engine: Engine, sequence: TokenSequence, batch: Batch, draft: Sequence[int]) -> Results:
    """Run the model on a sequence's newest token and on a draft of the next tokens (R = 1 + ``len(draft)``)."""
    start, tokens = len(sequence.tokens) - 1, [sequence.tokens[-1], *draft]
    sequence.written = max(sequence.written, start + len(tokens))
    step = engine.score(tokens, batch.cache, start=start, slot=sequence.slot)
    return _results(engine, step, [sequence])


def take(sequence: TokenSequence, results: Results, row: int, draft: Sequence[int] = ()) -> None:
    """Choose the next token of a sequence, and further tokens as long as the chosen tokens match the draft.

    Args:
        sequence: the sequence.
        results: the results of the call.
        row: the row of results for the sequence's newest token. The rows for the draft's tokens come directly after it.
        draft: the guessed tokens that the call processed after the newest token. Their keys and values are in the slot.
            The keys and values of wrong guesses are never read, because later calls overwrite them first.
    """
    for place, guess in enumerate((*draft, None), row):
        sequence.filled = len(sequence.tokens)
        if results.logits is None or sequence.sampler.is_greedy:
            token = results.tokens[place]
        else:
            token = sequence.sampler.sample(results.logits[place])
        sequence.accept(token)
        if token != guess or sequence.is_finished:
            return


def _results(engine: Engine, step: StepOutput, sequences: Sequence[TokenSequence]) -> Results:
    is_sampled = any(not s.sampler.is_greedy for s in sequences)
    return Results(step.token.tolist(), engine.logits(step) if is_sampled else None)
