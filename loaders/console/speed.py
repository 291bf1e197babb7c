"""Format the speed of answers as text."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..generation.stream import Completion


def brief(completion: "Completion") -> str:
    """Format the speed of one answer briefly."""
    timing, count = completion.timing, len(completion.token_ids)
    speed = f", {timing.decode_tokens_per_s:.1f} tokens/s" if count > 1 else ""
    limit = ", cut off at the limit" if completion.finish_reason == "length" else ""
    return f"{_tokens(count)}{speed}, first after {timing.prefill_s:.2f} s{limit}"


def full(completions: "list[Completion]", first_token_s: float | None = None) -> str:
    """Format the speed of answers in one line, for ``--stats``.

    Args:
        completions: at least one answer.
        first_token_s: seconds from the start of the process to the first token, or None to omit this figure.
    """
    prompt = sum(len(c.prompt_token_ids) for c in completions)
    prefill = sum(c.timing.prefill_s for c in completions)
    decoded = sum(len(c.token_ids) - 1 for c in completions)
    decode = sum(c.timing.decode_s for c in completions)
    count = f"{len(completions)} answers: " if len(completions) > 1 else ""
    first = "" if first_token_s is None else f", first token {first_token_s:.2f} s after the start"
    speed = f" at {decoded / decode:.1f} tokens/s" if decoded and decode else ""
    return (
        f"{count}prompt {_tokens(prompt)} in {prefill * 1e3:.0f} ms ({prompt / prefill:.1f} tokens/s){first};"
        f" generated {_tokens(decoded + len(completions))}{speed}"
    )


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"
