"""The key that artifacts must be signed with, named by a command, a call or the whole installation."""

import os
from pathlib import Path

# A file for everything that this environment starts, and one for every user of this machine.
VARIABLE = "PRECAST_REQUIRE_SIGNATURE"
SYSTEM_KEY = Path("/etc/precast/require-signature.pem")


def required_key(given: str | Path | None) -> Path | None:
    """Return the file of the public key that an artifact must be signed with; None where none is asked for.

    A key that is named takes the place of the environment's, and that one the machine's. Nothing given switches the
    requirement off.

    Args:
        given: named by an option or an argument.
    """
    if given is not None:
        return Path(given)
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    # Also where it is a link to nothing: then no artifact loads, rather than any.
    return SYSTEM_KEY if os.path.lexists(SYSTEM_KEY) else None
