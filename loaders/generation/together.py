"""Continue many prompts together."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import repeat

from ..artifact.errors import PrecastError
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .sequence import TokenSequence
from .stream import Completion, Stream, completion_of

Prompt = str | Sequence[int]


def pairs(
    prompts: Iterable[Prompt], params: SamplingParams | Iterable[SamplingParams | None] | None
) -> Iterator[tuple[Prompt, SamplingParams | None]]:
    """Return each prompt with its parameters.

    Raises:
        PrecastError: the prompts are a single text, or their number differs from that of the parameters.
    """
    if isinstance(prompts, str | bytes | bytearray):
        raise PrecastError(
            "prompts: expected a list of prompts, found a single one; give it to generate instead."
        )
    if params is None or isinstance(params, SamplingParams):
        return zip(prompts, repeat(params), strict=False)
    if isinstance(prompts, Sequence) and isinstance(params, Sequence) and len(prompts) != len(params):
        raise PrecastError(
            f"params: expected one for each of the {len(prompts)} prompts, found {len(params)}; give one for all, or as"
            " many as prompts."
        )
    return zip(prompts, params, strict=False)


def at(index: int, error: PrecastError) -> PrecastError:
    """Return an error that names the place of its prompt."""
    return PrecastError(f"prompts[{index}]: {str(error).removeprefix('prompt: ')}")


def results(
    scheduler: Scheduler, sequences: Iterable[Callable[[], TokenSequence]], most: int
) -> Iterator[tuple[int, Completion | PrecastError]]:
    """Run sequences together, and yield the place and the result of each as soon as it has ended.

    Args:
        scheduler: the scheduler to submit to.
        sequences: functions that make the sequences, whose `unread` has no limit. An error of one is its result.
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
                yield index, _result(running.pop(index))
    finally:
        for sequence in running.values():
            scheduler.close(sequence)


def finish(streams: Sequence[Stream], most: int) -> list[Completion]:
    """Read streams of one model to their ends together, and return their completions.

    Args:
        streams: the streams.
        most: maximum number of streams that run at a time.
    """
    waiting = deque(streams)
    running: list[Iterator[object]] = []
    try:
        while waiting or running:
            while waiting and len(running) < most:
                running.append(waiting.popleft().events())
            running = [events for events in running if next(events, None) is not None]
    except BaseException:
        for stream in streams:
            stream.close()
        raise
    return [stream.completion for stream in streams]


def _result(sequence: TokenSequence) -> Completion | PrecastError:
    """Return the result of a sequence that has ended.

    Raises:
        Exception: the sequence failed with another error than PrecastError.
    """
    if isinstance(sequence.error, PrecastError):
        return sequence.error
    if sequence.error is not None:
        raise sequence.error
    pieces = list(sequence.unread)
    sequence.unread.clear()
    return completion_of(
        sequence, "".join(p.text for p in pieces), [p.token for p in pieces if p.token is not None]
    )
