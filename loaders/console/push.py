"""The command ``precast push``."""

from pathlib import Path

from ..artifact.errors import printable
from .transfers import json_line, share


def run(artifact: Path, url: str, *, rehash: bool, as_json: bool) -> int:
    """Push an artifact, and print the amount of data that was sent.

    Returns:
        The exit code, 0.

    Raises:
        PrecastError: see `store.push.push`.
    """
    from ..store.push import push

    transfer = push(artifact, url, rehash=rehash)
    if as_json:
        print(json_line(transfer))
        return 0
    print(printable(f"pushed {transfer.path} to {transfer.store}: {share(transfer, 'sent', 'there')}"))
    print(printable(f"run it with: precast run {transfer.store}"))
    return 0
