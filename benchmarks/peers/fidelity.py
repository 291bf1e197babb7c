"""Compare the predictions of any contender with those of the reference, by the method of `precast eval`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from processes import Worker


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return float64 log-probabilities of rows of logits ``[T, V]``."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergences(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return KL(reference ‖ other) in nats for each row."""
    p, q = log_probabilities(reference), log_probabilities(other)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def measure(
    workers: dict[str, Worker], reference: str, windows: Sequence[Sequence[int]], folder: Path
) -> dict:
    """Return, for each contender, the mean and 99th percentile of the divergence, and the top-1 agreement.

    The first half of each window of tokens is prefilled, and the second half is decoded token by token.
    """
    kl = {name: [] for name in workers if name != reference}
    same = {name: [] for name in kl}
    for ids in windows:
        first = len(ids) // 2 - 1
        expected = _logits(workers[reference], ids, first, folder / "reference.npy")
        for name in kl:
            got = _logits(workers[name], ids, first, folder / "other.npy")
            kl[name].append(divergences(expected, got))
            same[name].append(expected.argmax(-1) == got.argmax(-1))
    return {name: summary(np.concatenate(kl[name]), np.concatenate(same[name])) for name in kl}


def _logits(worker: Worker, ids: Sequence[int], first: int, path: Path) -> np.ndarray:
    worker.ask(score=list(ids), first=first, out=str(path))
    return np.load(path)


def summary(kl: np.ndarray, same: np.ndarray) -> dict:
    """Return the figures of a contender, from the divergence of each prediction and from agreement on the top token."""
    return {
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1": float(same.mean()),
        "predictions": len(kl),
    }
