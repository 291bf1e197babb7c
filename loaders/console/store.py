"""What ``precast push`` and ``precast pull`` print."""

import json
import sys
from pathlib import Path

from ..artifact.errors import printable
from ..store.pull import pull as pull_artifact
from ..store.push import push as push_artifact
from ..store.transfer import Moved


def push(artifact: Path, url: str, *, verify: bool, as_json: bool) -> None:
    """Pushes an artifact and says on standard output what was sent.

    Raises:
        PrecastError: as `store_push.push`.
    """
    found = push_artifact(artifact, url, verify=verify)
    if as_json:
        print(_json_line(found))
        return
    print(printable(f"pushed {found.path} to {found.store}: {_share(found, 'sent', 'the rest was there')}"))
    print(printable(f"run it with: precast run {found.store}"))


def pull(
    url: str, output: Path | None, *, overwrite: bool, require_signature: Path | None, as_json: bool
) -> None:
    """Pulls an artifact and says on standard output what was fetched.

    Raises:
        PrecastError: as `store_pull.pull`.
    """
    found = pull_artifact(
        url, output, overwrite=overwrite, require_signature=require_signature, log=_to_stderr
    )
    if as_json:
        print(_json_line(found))
        return
    signed = "signature checked" if require_signature else "signed" if found.signed else "not signed"
    share = _share(found, "fetched", "the rest was here")
    print(printable(f"pulled {found.store} to {found.path}: {share}; {signed}"))
    print(printable(f"run it with: precast run {found.path}"))


def _share(found: Moved, done: str, rest: str) -> str:
    pieces = f"{found.moved_pieces} of {found.pieces} pieces, {found.moved_bytes / 1e6:,.1f} of"
    all_of_it = found.moved_pieces == found.pieces
    return f"{done} {pieces} {found.bytes / 1e6:,.1f} MB{'' if all_of_it else f', {rest}'}"


def _json_line(found: Moved) -> str:
    return json.dumps({**vars(found), "path": str(found.path)})


def _to_stderr(message: str) -> None:
    print(printable(message), file=sys.stderr)
