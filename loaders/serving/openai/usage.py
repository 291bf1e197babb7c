"""The counts and times that accompany answers of OpenAI's API."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...generation.model import Model
    from ...generation.stream import Completion


# The last event of a stream.
DONE = b"data: [DONE]\n\n"


def with_usage(
    head: Mapping[str, Any], choices: Sequence[Mapping[str, Any]], done: "Sequence[Completion]", count: int
) -> dict[str, Any]:
    """Return a response, or the last chunk of a stream, with its counts and times; `count` is as for `usage`."""
    return {**head, "choices": choices, "usage": usage(done, count), "timings": timings(done)}


def usage(done: "Sequence[Completion]", count: int) -> dict[str, Any]:
    """Return the numbers of tokens.

    Args:
        done: all answers of a request.
        count: number of answers to each prompt; a prompt counts once.
    """
    prompts = sum(len(completion.prompt_token_ids) for completion in done[::count])
    tokens = sum(len(completion.token_ids) for completion in done)
    cached = sum(completion.timing.cached_tokens for completion in done[::count])
    return {
        "prompt_tokens": prompts,
        "completion_tokens": tokens,
        "total_tokens": prompts + tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings(done: "Sequence[Completion]") -> dict[str, Any]:
    """Return the times of the first answer, with the names of llama.cpp's server."""
    completion = done[0]
    timing = completion.timing
    read = len(completion.prompt_token_ids) - timing.cached_tokens
    return {
        "queue_ms": round(timing.queue_s * 1e3, 3),
        "cache_n": timing.cached_tokens,
        "prompt_n": read,
        "prompt_ms": round(timing.prefill_s * 1e3, 3),
        "prompt_per_second": round(read / timing.prefill_s, 2) if timing.prefill_s else 0.0,
        "predicted_n": len(completion.token_ids),
        "predicted_ms": round(timing.decode_s * 1e3, 3),
        "predicted_per_second": round(timing.decode_tokens_per_s, 2),
    }


def fingerprint(model: "Model") -> str:
    """Return a name for the combination of weights and target, which together determine an answer."""
    from ...artifact.manifest import WEIGHTS_FILE

    return f"{model.manifest.files[WEIGHTS_FILE].sha256[:12]}-{model.target.name}"
