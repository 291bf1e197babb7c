"""Detached signatures: prove an artifact's origin offline, with a public key that the user already has.

``manifest.json`` contains the sha256 of every other file, so a signature over its bytes covers the artifact. OpenSSF
model signing (https://github.com/sigstore/model-transparency) creates and verifies the signature. It is stored beside
the manifest as a Sigstore bundle: a DSSE envelope around an in-toto statement with the manifest's sha256. Keys are
elliptic curve keys in PEM files.
"""

import base64
import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from .artifact import files
from .artifact.errors import PrecastError
from .artifact.interrupt import on_interrupt
from .artifact.json_records import MAX_JSON_BYTES, parse_json
from .artifact.manifest import MANIFEST_FILE, SIGNATURE_FILE
from .artifact.manifest_parser import parse_manifest

# Size limits in bytes, far above the size of any signature or key.
MAX_SIGNATURE_BYTES = 1 << 20
_MAX_KEY_BYTES = 1 << 16
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_SHA256 = re.compile("[0-9a-f]{64}")
_PREDICATE = "https://model_signing/signature/v1.0"
_REMEDY = "have the artifact signed again"
_NO_SIGNATURE = f"expected a signature of OpenSSF model signing, found something else; {_REMEDY}."


def sign(root: Path, key: Path, ask_password: Callable[[], str]) -> str:
    """Hash every file of an artifact, sign its manifest, and write ``manifest.json.sig``.

    Args:
        root: the artifact's folder.
        key: file of the private key.
        ask_password: a function that returns the password. It is called only for an encrypted key.

    Returns:
        The sha256 of the public key.

    Raises:
        PrecastError: a file does not match the manifest, the key is not a supported private key, or the password is
            wrong.
    """
    _need_library()
    password, public = _open_private(key, ask_password)
    manifest = files.read(root, MANIFEST_FILE, limit=MAX_JSON_BYTES)
    for name, entry in parse_manifest(manifest, str(root / MANIFEST_FILE)).files.items():
        files.open_checked(root, name, entry, rehash=True).close()
    signature = _sign(manifest, key, password)
    _check_bundle(manifest, signature, public, str(key), str(root))
    path = root / SIGNATURE_FILE
    files.write_atomically(path, signature)
    # Let everybody who can read the manifest also read the signature.
    path.chmod((root / MANIFEST_FILE).stat().st_mode & 0o777)
    return _fingerprint(public)


def check_signature(root: Path, manifest: bytes, key: Path) -> None:
    """Verify an artifact's signature over a manifest that has not been parsed yet.

    Args:
        root: the artifact's folder, from which the signature is read.
        manifest: contents of the manifest, untrusted.
        key: file of the public key.

    Raises:
        PrecastError: the signature is missing or invalid, was made with another key, or covers another manifest; or the
            file `key` does not contain a supported public key.
    """
    signature = None
    if (root / SIGNATURE_FILE).exists():
        signature = files.read(root, SIGNATURE_FILE, limit=MAX_SIGNATURE_BYTES)
    check_bytes(manifest, signature, key, str(root))


def check_bytes(manifest: bytes, signature: bytes | None, key: Path, where: str) -> None:
    """Verify a signature in memory.

    Args:
        manifest: contents of the manifest, untrusted.
        signature: contents of the signature; None if the artifact has none.
        key: file of the public key.
        where: the artifact's name in messages.

    Raises:
        PrecastError: see `check_signature`.
    """
    _need_library()
    public = _read_public(key)
    if signature is None:
        raise PrecastError(
            f"{where}: expected a signature, found no {SIGNATURE_FILE}; ask for a copy that its maker has signed"
            " (precast sign)."
        )
    _check_bundle(manifest, signature, public, str(key), where)


def fingerprint(key: Path) -> str:
    """Return the sha256 of a public key's PEM form, by which signatures identify the key.

    Raises:
        PrecastError: the file does not contain a supported public key.
    """
    _need_library()
    return _fingerprint(_read_public(key))


def signed_digest(signature: bytes, where: str) -> str:
    """Return the sha256 of the manifest that a signature claims to cover, without verifying the signature.

    Raises:
        PrecastError: the bytes are not a signature of OpenSSF model signing.
    """
    return _statement(signature, f"{where}: {SIGNATURE_FILE}")[1]


def _check_bundle(manifest: bytes, signature: bytes, public: Any, key: str, where: str) -> None:
    at = f"{where}: {SIGNATURE_FILE}"
    hint, signed = _statement(signature, at)
    if hint != _fingerprint(public):
        raise PrecastError(
            f"{at}: expected a signature made with {key} (sha256 {_fingerprint(public):.12}…), found one made with"
            f" another key (sha256 {hint:.12}…); ask the artifact's maker for the public key {hint:.12}…, or for a copy"
            " signed with the expected key."
        )
    if signed != hashlib.sha256(manifest).hexdigest():
        raise PrecastError(
            f"{where}: {MANIFEST_FILE} is not the one that was signed: it was altered, or the signature belongs to"
            " another artifact; copy the artifact again, or have it signed again."
        )
    _verify(manifest, signature, public, at)


def _verify(manifest: bytes, signature: bytes, public: Any, at: str) -> None:
    """Have the library verify the signature on private copies of the files, which no other user can change."""
    from model_signing import verifying

    with _copies(manifest, signature, _pem(public)) as (manifest_path, signature_path, key_path):
        try:
            config = verifying.Config().use_elliptic_key_verifier(public_key=key_path)
            config.set_hashing_config(_hashing()).verify(manifest_path, signature_path)
        except OSError:
            raise
        # Catch every exception, because the library documents none and the bundle is untrusted.
        except Exception:
            raise PrecastError(
                f"{at}: the signature is invalid, so it was altered; copy the artifact again, or have it signed again."
            ) from None


def _statement(signature: bytes, at: str) -> tuple[str, str]:
    """Return the fingerprint of the key and the sha256 of the manifest that a bundle claims; verify neither.

    Raises:
        PrecastError: the bundle is not a statement about exactly one file.
    """
    try:
        bundle = parse_json(signature, at, _REMEDY)
        hint = bundle["verificationMaterial"]["publicKey"]["hint"]
        payload = parse_json(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True), at, _REMEDY)
        [resource] = payload["predicate"]["resources"]
        if payload["predicateType"] != _PREDICATE or (resource["name"], resource["algorithm"]) != (
            ".",
            "sha256",
        ):
            raise ValueError
        digest = resource["digest"]
        if not _SHA256.fullmatch(hint) or not _SHA256.fullmatch(digest):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise PrecastError(f"{at}: {_NO_SIGNATURE}") from None
    return hint, digest


def _sign(manifest: bytes, key: Path, password: bytes | None) -> bytes:
    from model_signing import signing

    with _copies(manifest, b"", b"") as (manifest_path, signature_path, _):
        # The library passes the password to cryptography, which requires bytes.
        config = signing.Config().use_elliptic_key_signer(private_key=key, password=password)
        config.set_hashing_config(_hashing()).sign(manifest_path, signature_path)
        return signature_path.read_bytes()


def _hashing() -> Any:
    from model_signing import hashing

    config = hashing.Config().use_file_serialization(hashing_algorithm="sha256")
    return config.set_ignored_paths(paths=[], ignore_git_paths=False)


@contextmanager
def _copies(manifest: bytes, signature: bytes, key: bytes) -> Iterator[tuple[Path, Path, Path]]:
    """Yield private files with the given contents, because the library reads only files."""
    with (
        tempfile.TemporaryDirectory(prefix="precast-") as folder,
        on_interrupt(partial(shutil.rmtree, folder)),
    ):
        paths = Path(folder, MANIFEST_FILE), Path(folder, SIGNATURE_FILE), Path(folder, "public.pem")
        for path, data in zip(paths, (manifest, signature, key), strict=True):
            path.write_bytes(data)
        yield paths


# --- keys ---------------------------------------------------------------------------------------------------


def _read_key(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_KEY_BYTES + 1)
    except OSError as error:
        raise PrecastError(
            f"{path}: the key cannot be read ({error.strerror or error}); check the path."
        ) from None
    if len(data) > _MAX_KEY_BYTES:
        raise PrecastError(
            f"{path}: expected a key in PEM, found more than {_MAX_KEY_BYTES} bytes; check the path."
        )
    return data


def _read_public(path: Path) -> Any:
    from cryptography.hazmat.primitives import serialization

    data = _read_key(path)
    if b"PRIVATE KEY" in data:
        raise PrecastError(
            f"{path}: expected a public key, found a private key; write its public key with: openssl ec -in PRIVATE.pem"
            " -pubout -out PUBLIC.pem"
        )
    try:
        key = serialization.load_pem_public_key(data)
    except Exception:  # cryptography raises exceptions of many types for an invalid key
        raise PrecastError(
            f"{path}: expected a public key in PEM, found something else; write one with: openssl ec -in PRIVATE.pem"
            " -pubout -out PUBLIC.pem"
        ) from None
    return _checked_curve(path, key)


def _open_private(path: Path, ask_password: Callable[[], str]) -> tuple[bytes | None, Any]:
    """Open a private key; return its password (None if the key is not encrypted) and its public key."""
    from cryptography.hazmat.primitives import serialization

    data = _read_key(path)
    if b"PRIVATE KEY" not in data:
        what = "a public key" if b"PUBLIC KEY" in data else "something else"
        raise PrecastError(
            f"{path}: expected a private key in PEM, found {what}; make one with: openssl ecparam -name prime256v1"
            " -genkey -noout -out PRIVATE.pem"
        )
    password = None
    if b"ENCRYPTED" in data:
        password = ask_password().encode()
    try:
        key = serialization.load_pem_private_key(data, password)
    except Exception:
        if password is not None:
            raise PrecastError(f"{path}: this password does not open the private key; try another.") from None
        raise PrecastError(
            f"{path}: expected a private key in PEM, found a damaged one; copy the key again."
        ) from None
    return password, _checked_curve(path, key).public_key()


def _checked_curve(path: Path, key: Any) -> Any:
    """Return a key after checking that its curve is supported."""
    curve = getattr(getattr(key, "curve", None), "name", type(key).__name__.strip("_"))
    if curve not in _CURVES:
        raise PrecastError(
            f"{path}: expected an elliptic curve key of P-256, P-384 or P-521, found {curve}; make one with: openssl"
            " ecparam -name prime256v1 -genkey -noout -out PRIVATE.pem"
        )
    return key


def _pem(public: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    data: bytes = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return data


def _fingerprint(public: Any) -> str:
    return hashlib.sha256(_pem(public)).hexdigest()


def _need_library() -> None:
    try:
        import model_signing  # noqa: F401
    except ImportError as error:
        raise PrecastError(
            f"signatures need {error.name or 'model_signing'}, which is not installed: pip install 'precast[sign]'"
        ) from None
