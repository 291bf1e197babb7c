"""``golden.json``: answers that an artifact must reproduce, wherever it runs."""

from dataclasses import dataclass

from .errors import PrecastError
from .manifest import Manifest
from .record import from_json, parse_json


@dataclass(frozen=True, kw_only=True)
class FirstLogits:
    """Logits of a prompt's last token, of the likeliest tokens.

    Attributes:
        token_ids: which, likeliest first.
        values: their logits, as the first target gave them at export.
        tolerance: how far another machine's may be from them.
    """

    token_ids: tuple[int, ...]
    values: tuple[float, ...]
    tolerance: float


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a prompt is continued with.

    Attributes:
        prompt_token_ids: the prompt.
        token_ids: the greedy answer, end tokens ignored; none where the first token is a tie.
        first_logits: of the answer's first step.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    first_logits: FirstLogits


@dataclass(frozen=True, kw_only=True)
class Golden:
    """All of ``golden.json``."""

    greedy: tuple[Answer, ...]


def parse_golden(data: bytes, manifest: Manifest, where: str) -> Golden:
    """Parses and checks the golden answers of an artifact.

    Raises:
        PrecastError: for any key or value out of place, and for answers that this model cannot give.
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
    if not answer.prompt_token_ids or length > manifest.context:
        raise PrecastError(
            f"{where}: a prompt and an answer of {length} tokens do not fit a context of {manifest.context}; export"
            " the model again."
        )
    if len(answer.prompt_token_ids) >= manifest.context:
        raise PrecastError(f"{where}: the prompt leaves no room for an answer; export the model again.")
    if max((*answer.prompt_token_ids, *answer.token_ids, *first.token_ids)) >= vocab:
        raise PrecastError(f"{where}: a token is outside the model's {vocab}; export the model again.")
    if not first.token_ids or len(first.token_ids) != len(first.values):
        raise PrecastError(
            f"{where}: expected a logit for each token, found {len(first.values)} for {len(first.token_ids)}; export"
            " the model again."
        )
