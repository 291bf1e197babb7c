"""Metrics in Prometheus' format. Importing Prometheus' client takes as long as loading a small model's weights."""

import asyncio
from collections.abc import Sequence
from importlib import import_module
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
        self._families: Families | None = None
        self._ended: list[tuple[str, Sequence[Completion]]] = []  # the answers that ended before the import

    def observe(self, model: str, done: "Sequence[Completion]") -> None:
        """Record answers that have ended."""
        if self._families is None:
            self._ended.append((model, done))
        else:
            self._families.observe(model, done)

    async def start(self) -> None:
        """Import Prometheus' client in a thread, and record the answers that have ended so far."""
        if self._families is None:
            await asyncio.to_thread(import_module, ".prometheus", __package__)
        if self._families is None:  # no other request was faster
            from .prometheus import Families

            self._families = Families(self._pool)
            for ended in self._ended:
                self._families.observe(*ended)
            self._ended.clear()

    async def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        await self.start()
        assert self._families is not None
        return self._families.text()
