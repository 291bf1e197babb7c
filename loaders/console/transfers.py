"""Format the result of a push or a pull."""

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..store.transfer import Transfer


def share(transfer: "Transfer", moved: str, place: str) -> str:
    """Format the share of an artifact that was transferred.

    Args:
        transfer: the result.
        moved: word for the transfer, such as "sent".
        place: word for the place of the pieces that were not transferred, such as "there".
    """
    pieces = f"{transfer.moved_pieces} of {transfer.pieces} pieces"
    size = f"{transfer.moved_bytes / 1e6:,.1f} of {transfer.bytes / 1e6:,.1f} MB"
    rest = "" if transfer.moved_pieces == transfer.pieces else f", the rest was {place}"
    return f"{moved} {pieces}, {size}{rest}"


def json_line(transfer: "Transfer") -> str:
    """Format the result as one line of JSON."""
    return json.dumps({**vars(transfer), "path": str(transfer.path)})
