"""Continue many prompts together."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import repeat
from typing import TypeVar

from ..artifact.errors import PrecastError
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .sequence import TokenSequence
from .stream import Completion, Stream

_Prompt = TypeVar("_Prompt")


def pairs(
    prompts: Iterable[_Prompt], params: SamplingParams | Iterable[SamplingParams | None] | None
) -> Iterator[tuple[_Prompt, SamplingParams | None]]:
    """Pair each prompt with its sampling parameters.

    Raises:
        PrecastError: the prompts are a single string, or both arguments are sequences and their lengths differ.
    """
    if isinstance(prompts, str | bytes | bytearray):
        raise PrecastError(
            "prompts: expected a list of prompts, found a single prompt; pass it to generate instead."
        )
    if params is None or isinstance(params, SamplingParams):
        return zip(prompts, repeat(params), strict=False)
    if isinstance(prompts, Sequence) and isinstance(params, Sequence) and len(prompts) != len(params):
        raise PrecastError(
            f"params: expected {len(prompts)} sets of parameters (one for each prompt), found {len(params)}; give one"
            " set for all prompts, or one for each."
        )
    return zip(prompts, params, strict=False)


def at(index: int, error: PrecastError) -> PrecastError:
    """Return an error with the index of the prompt in the message."""
    return PrecastError(f"prompts[{index}]: {str(error).removeprefix('prompt: ')}")


def results(
    scheduler: Scheduler, sequences: Iterable[Callable[[], TokenSequence]], most: int
) -> Iterator[tuple[int, Completion | PrecastError]]:
    """Run sequences together, and yield the index and the result of each sequence as soon as it has ended.

    Args:
        scheduler: the scheduler to submit to.
        sequences: functions that create the sequences. Every sequence must have `most_unread` None. If a function
            raises PrecastError, that error is the result of the sequence.
        most: maximum number of sequences at a time.
    """
    left = enumerate(sequences)
    running: dict[int, TokenSequence] = {}
    try:
        while True:
            while len(running) < most and (following := next(left, None)) is not None:
                index, make = following
                try:
                    sequence = make()
                except PrecastError as error:
                    yield index, error
                    continue
                scheduler.submit(sequence)
                running[index] = sequence
            if not running:
                return
            scheduler.advance(lambda: any(s.ended for s in running.values()))
            for index in [i for i, s in running.items() if s.ended]:
                yield index, _result(scheduler, running.pop(index))
    finally:
        # Cancel without waiting, because the garbage collector may close this generator in the thread that runs a step.
        for sequence in running.values():
            scheduler.cancel(sequence)


def answers(
    scheduler: Scheduler,
    make: Callable[[SamplingParams], TokenSequence],
    count: int,
    params: SamplingParams,
    most: int,
) -> list[Completion]:
    """Generate several answers to one prompt together.

    Args:
        scheduler: the scheduler to submit to.
        make: a function that creates a sequence with the given parameters, and with `most_unread` None.
        count: number of answers.
        params: the sampling parameters.
        most: maximum number of sequences at a time.

    Raises:
        PrecastError: the count is below 1, or an answer failed. After a failure, all other answers end.
    """
    if not isinstance(count, int) or count < 1:
        raise PrecastError(f"count: expected a number of at least 1, found {count!r:.60}.")
    sequences = (partial(make, each) for each in params.for_answers(count))
    found: dict[int, Completion] = {}
    for index, result in results(scheduler, sequences, most):
        if isinstance(result, PrecastError):
            raise result
        found[index] = result
    return [found[index] for index in range(count)]


def _result(scheduler: Scheduler, sequence: TokenSequence) -> Completion | PrecastError:
    """Return the result of a sequence that has ended.

    Raises:
        Exception: the sequence failed with an error other than PrecastError.
    """
    if isinstance(sequence.error, PrecastError):
        return sequence.error
    if sequence.error is not None:
        raise sequence.error
    # A stream splits the answer to a chat into its parts.
    return Stream(scheduler, sequence).finish()
