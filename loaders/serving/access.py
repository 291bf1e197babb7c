"""Access control of the server: API keys, and the host names under which a local server accepts requests."""

import hmac
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path

from ..artifact.errors import PrecastError
from .errors import ApiError

KEYS_VARIABLE = "PRECAST_API_KEYS"


def read_keys(path: Path | None, environment: Mapping[str, str]) -> tuple[bytes, ...]:
    """Return the API keys in a file, one per line; without a file, the comma-separated keys in PRECAST_API_KEYS.

    The file may contain empty lines, and comments in lines that begin with "#".

    Raises:
        PrecastError: the file cannot be read; or the file or the variable contains no key, or a key with a space or
            with other characters than printable ASCII.
    """
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise PrecastError(f"{path}: cannot be read ({reason}); check --api-key-file.") from None
        parts, source, remedy = text.splitlines(), str(path), "write one per line"
    elif KEYS_VARIABLE in environment:
        parts, source, remedy = (
            environment[KEYS_VARIABLE].split(","),
            KEYS_VARIABLE,
            "separate keys by commas",
        )
    else:
        return ()
    keys = [key for part in parts if (key := part.strip()) and not (path is not None and key[0] == "#")]
    if not keys:
        raise PrecastError(f"{source}: expected at least one API key, found none; {remedy}.")
    if any(len(key.split()) > 1 for key in keys):
        raise PrecastError(f"{source}: expected API keys without spaces; {remedy}.")
    if any(not (key.isascii() and key.isprintable()) for key in keys):
        raise PrecastError(f"{source}: expected API keys of printable ASCII characters; replace the key.")
    return tuple(key.encode() for key in keys)


def check_key(headers: Mapping[str, str], keys: Sequence[bytes]) -> None:
    """Check a request's API key in constant time, independent of the key.

    Raises:
        ApiError: the server requires a key, and the request has no key or a wrong one.
    """
    if not keys:
        return
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    # Compare with every key, so that the time does not reveal which key matches.
    found = [hmac.compare_digest(given.encode(), key) for key in keys]
    if not any(found):
        text = (
            "Incorrect API key; give a valid one in the header Authorization: Bearer KEY, or x-api-key: KEY."
        )
        raise ApiError(401, text, code="invalid_api_key")


def check_host(headers: Mapping[str, str], address: str, name: str = "localhost") -> None:
    """Refuse requests that a web page may have sent to a local server by DNS rebinding.

    Args:
        headers: the request's headers.
        address: the address on which the server listens.
        name: a further name of that address.

    Raises:
        ApiError: the server listens on a loopback address, and the header Host names another machine.
    """
    given = _name(headers.get("host", "localhost"))
    if is_local(address) and not (is_local(given) or given.lower() == name.lower()):
        raise ApiError(
            403, "The header Host must name this machine: localhost or 127.0.0.1.", code="host_not_allowed"
        )


def _name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() else host


def is_local(address: str) -> bool:
    """Return True for "localhost" and for a loopback address."""
    if address.lower() == "localhost":
        return True
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False
