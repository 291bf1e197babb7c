"""The public key that must verify every artifact's signature, set by a call, the environment or the machine."""

import os
from pathlib import Path

# The variable contains the path of a key file. The system key applies to all users of this machine.
ENVIRONMENT_VARIABLE = "PRECAST_REQUIRE_SIGNATURE"
SYSTEM_KEY = Path("/etc/precast/require-signature.pem")


def required_key(given: str | Path | None) -> Path | None:
    """Return the file of the public key that must verify every artifact's signature; None if signatures are optional.

    A given key overrides the key in the environment, which overrides the key of the machine. So an argument can replace
    the required key, but cannot remove the requirement.

    Args:
        given: file of the key that an option or an argument names; None if there is none.
    """
    if given is not None:
        return Path(given)
    if named := os.environ.get(ENVIRONMENT_VARIABLE):
        return Path(named).expanduser()
    # lexists is True even for a dangling symlink, so a missing key blocks every load instead of allowing every load.
    return SYSTEM_KEY if os.path.lexists(SYSTEM_KEY) else None
