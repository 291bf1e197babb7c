"""Garbage collection during imports and loads."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Turn garbage collection off inside a block that creates no garbage."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            # The two calls move all objects to the oldest generation. Otherwise the next collection of young objects
            # would visit every object that the block has created.
            gc.freeze()
            gc.unfreeze()
        if collecting:
            gc.enable()
