"""The key that artifacts must be signed with, set by a command, a call or the whole installation."""

import os
from pathlib import Path

# The variable names a key for this environment, the file is the key for every user of this machine.
VARIABLE = "PRECAST_REQUIRE_SIGNATURE"
SYSTEM_KEY = Path("/etc/precast/require-signature.pem")


def required_key(given: str | Path | None) -> Path | None:
    """Return the file of the public key that an artifact must be signed with, or None.

    A given key overrides the environment's, and that overrides the machine's. No argument switches the requirement off.

    Args:
        given: the key named by an option or an argument.
    """
    if given is not None:
        return Path(given)
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    # Also if it is a dangling link: then no artifact loads, rather than any.
    return SYSTEM_KEY if os.path.lexists(SYSTEM_KEY) else None
