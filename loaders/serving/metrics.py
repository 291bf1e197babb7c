"""Metrics in Prometheus' format. Importing Prometheus' client takes as long as loading a small model's weights."""

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

from .pool import Pool

if TYPE_CHECKING:
    from ..generation.stream import Completion
    from .prometheus import Families

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of a server. Only the event loop's thread may use them.

    Args:
        pool: the models.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def observe(self, model: str, done: "Iterable[Completion]") -> None:
        """Record answers that have ended."""
        self._families.observe(model, done)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return self._families.text()

    @cached_property
    def _families(self) -> "Families":
        from .prometheus import Families

        return Families(self._pool)
