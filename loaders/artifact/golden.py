"""``golden.json``: recorded answers that an artifact must reproduce on every machine."""

from dataclasses import dataclass

from .errors import PrecastError
from .json_records import from_json, parse_json
from .manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class FirstLogits:
    """The largest logits after a prompt.

    Attributes:
        token_ids: tokens with the largest logits, in descending order of their logits.
        values: the logits of these tokens, as the first target computed them at export.
        tolerance: largest absolute difference allowed on another machine or target.
    """

    token_ids: tuple[int, ...]
    values: tuple[float, ...]
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A golden answer.

    Attributes:
        prompt_token_ids: the prompt.
        token_ids: the greedy continuation, which does not stop at end-of-sequence tokens. It is empty if the two
            largest logits of the first step are so close that another machine may choose the other token.
        first_logits: the largest logits of the first step.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    first_logits: FirstLogits


@dataclass(frozen=True, kw_only=True)
class Golden:
    """The contents of ``golden.json``."""

    greedy: tuple[Answer, ...]


def parse_golden(data: bytes, manifest: Manifest, where: str) -> Golden:
    """Parse and check the golden answers of an artifact.

    Args:
        data: contents of the file.
        manifest: the artifact's manifest.
        where: the file's path, for messages.

    Raises:
        PrecastError: a key or value is invalid, or an answer is impossible for this model.
    """
    golden = from_json(Golden, parse_json(data, where), where)
    if not golden.greedy:
        raise PrecastError(f"{where}: expected at least one answer, found none; export the model again.")
    for i, answer in enumerate(golden.greedy):
        _check(answer, manifest, f"{where}: greedy[{i}]")
    return golden


def _check(answer: Answer, manifest: Manifest, where: str) -> None:
    first, vocab = answer.first_logits, manifest.model.vocab
    length = len(answer.prompt_token_ids) + len(answer.token_ids)
    if not answer.prompt_token_ids:
        raise PrecastError(
            f"{where}: expected a prompt of at least one token, found none; export the model again."
        )
    if length > manifest.context:
        raise PrecastError(
            f"{where}: expected a prompt and an answer of at most {manifest.context} tokens together, found"
            f" {length}; export the model again."
        )
    if len(answer.prompt_token_ids) >= manifest.context:
        raise PrecastError(
            f"{where}: expected a prompt shorter than the context of {manifest.context} tokens, found"
            f" {len(answer.prompt_token_ids)}; export the model again."
        )
    if max((*answer.prompt_token_ids, *answer.token_ids, *first.token_ids)) >= vocab:
        raise PrecastError(
            f"{where}: expected token ids below {vocab}, found a larger one; export the model again."
        )
    if not first.token_ids or len(first.token_ids) != len(first.values):
        raise PrecastError(
            f"{where}: expected a logit for each token, found {len(first.values)} for {len(first.token_ids)}; export"
            " the model again."
        )
