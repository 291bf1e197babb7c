"""The command ``precast sign``."""

import os
from pathlib import Path

import click

from ..artifact.errors import printable
from ..artifact.interrupt import raise_on_interrupt
from ..locate import find_artifact

_PASSWORD = "PRECAST_KEY_PASSWORD"


def run(artifact: Path, *, key: Path) -> int:
    """Sign an artifact, and print how to check the signature.

    Returns:
        The exit code, 0.

    Raises:
        PrecastError: see `signing.sign`.
    """
    from ..signing import sign

    root = find_artifact(artifact)
    fingerprint = sign(root, key, lambda: _password(key))
    print(printable(f"signed {root} with the key of sha256 {fingerprint}"))
    print(printable(f"check it with: precast run {root} --require-signature PUBLIC.pem"))
    return 0


def _password(key: Path) -> str:
    """Return the password of a private key from the environment, or ask for it on the terminal."""
    if (password := os.environ.get(_PASSWORD)) is not None:
        return password
    with raise_on_interrupt():  # so that click can turn the terminal's echo on again
        typed: str = click.prompt(f"password of {key}", hide_input=True, err=True)
        return typed
