"""The command ``precast pull``."""

from pathlib import Path

from ..artifact.errors import log_to_stderr, printable
from .transfers import json_line, share


def run(
    url: str, *, output: Path | None, overwrite: bool, require_signature: Path | None, as_json: bool
) -> int:
    """Pull an artifact, and print the amount of data that was fetched.

    Returns:
        The exit code, 0.

    Raises:
        PrecastError: see `store.pull.pull`.
    """
    from ..store.pull import pull

    transfer = pull(url, output, overwrite=overwrite, require_signature=require_signature, log=log_to_stderr)
    if as_json:
        print(json_line(transfer))
        return 0
    signed = "signature checked" if require_signature else "signed" if transfer.signed else "not signed"
    fetched = share(transfer, "fetched", "here")
    print(printable(f"pulled {transfer.store} to {transfer.path}: {fetched}; {signed}"))
    print(printable(f"run it with: precast run {transfer.path}"))
    return 0
