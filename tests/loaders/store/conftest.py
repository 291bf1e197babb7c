"""Stores of each kind, records of their traffic, and functions that inspect them."""

import filecmp
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from precast.loaders.store import pull as store_pull
from precast.loaders.store import remote as store_remote
from precast.loaders.store.transfer import Transfer

BUCKET = "models"


@pytest.fixture(scope="module")
def s3_server():
    """Run an S3 server with an empty bucket, and set the environment for it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3", use_listings_cache=False).makedirs(BUCKET, exist_ok=True)
        yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@pytest.fixture(params=["file", "memory", "s3"])
def url(request, tmp_path) -> str:
    """Return a URL for a push, in an empty store; the test runs once for each kind of store."""
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        return f"s3://{BUCKET}/{tmp_path.name}/tiny"
    return f"{request.param}://{tmp_path}/store/tiny"


@pytest.fixture
def folder_url(tmp_path) -> str:
    """Return a URL for a push, in an empty folder."""
    return f"file://{tmp_path}/store/tiny"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch, own_cache):
    """Retry without delay, with a separate cache folder for each test."""
    monkeypatch.setattr(store_remote, "_WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def traffic(monkeypatch) -> SimpleNamespace:
    """Count reads and writes of stores by kind of path, and let tests make them fail."""
    found = SimpleNamespace(reads=Counter(), writes=Counter(), fail=lambda what, path: None)
    lock, read, write = threading.Lock(), store_remote.Store._read, store_remote.Store._write

    def count(counter, what, path):
        with lock:
            found.fail(what, path)
            counter["piece" if "/pieces/" in path else "index"] += 1

    def counted_read(self, path, limit):
        count(found.reads, "read", path)
        return read(self, path, limit)

    def counted_write(self, path, data):
        count(found.writes, "write", path)
        return write(self, path, data)

    monkeypatch.setattr(store_remote.Store, "_read", counted_read)
    monkeypatch.setattr(store_remote.Store, "_write", counted_write)
    return found


@pytest.fixture
def keys(tmp_path) -> SimpleNamespace:
    """Return two key pairs, `maker` and `other`, each as the files `private` and `public`."""
    found = SimpleNamespace()
    for name in ("maker", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub.pem"
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        public.write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
        setattr(found, name, SimpleNamespace(private=private, public=public))
    return found


# --- helpers ------------------------------------------------------------------------------------------------


@pytest.fixture
def pull() -> Callable[..., Transfer]:
    """Return a function that pulls without messages."""

    def run(url: str, folder: Path, *, overwrite: bool = False, key: Path | None = None) -> Transfer:
        return store_pull.pull(url, folder, overwrite=overwrite, require_signature=key, log=lambda _: None)

    return run


@pytest.fixture
def same_folder() -> Callable[[Path, Path], bool]:
    """Return a function that compares two folders byte by byte."""

    def compare(a: Path, b: Path) -> bool:
        def names(root: Path) -> list[Path]:
            return sorted(p.relative_to(root) for p in root.rglob("*"))

        files = [str(n) for n in names(a) if (a / n).is_file()]
        return names(a) == names(b) and filecmp.cmpfiles(a, b, files, shallow=False)[1:] == ([], [])

    return compare


@pytest.fixture
def nothing_in() -> Callable[[Path], bool]:
    """Return a function that tells if a folder is missing or empty."""
    return lambda folder: not folder.exists() or os.listdir(folder) == []


@pytest.fixture
def replace() -> Callable[[Path, str, bytes], None]:
    """Return a function that makes another version of an artifact: it changes a file and its entry in the manifest."""

    def write(root: Path, name: str, data: bytes) -> None:
        (root / name).write_bytes(data)
        manifest = json.loads((root / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (root / "manifest.json").write_text(json.dumps(manifest))

    return write


@pytest.fixture
def flip() -> Callable[[Path], None]:
    """Return a function that changes one byte of a file."""

    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return change


@pytest.fixture
def pieces_of() -> Callable[[str], list[Path]]:
    """Return a function that lists the pieces of a folder's store."""

    def find(url: str) -> list[Path]:
        store = Path(url.removeprefix("file://")).parent
        return sorted(p for p in (store / "pieces").rglob("*") if p.is_file())

    return find


@pytest.fixture
def in_index() -> Callable[[str], dict[str, Any]]:
    """Return a function that reads the index in a folder's store."""
    return lambda url: json.loads(Path(f"{url.removeprefix('file://')}.json").read_text())


@pytest.fixture
def put_signature(in_index: Callable[[str], dict[str, Any]]) -> Callable[[str, bytes], None]:
    """Return a function that replaces an artifact's signature in the store, as the store's owner can."""

    def write(url: str, signature: bytes) -> None:
        path = Path(url.removeprefix("file://"))
        index, digest = in_index(url), hashlib.sha256(signature).hexdigest()
        (path.parent / "pieces" / digest[:2]).mkdir(exist_ok=True)
        (path.parent / "pieces" / digest[:2] / digest).write_bytes(signature)
        piece = {"bytes": len(signature), "sha256": digest}
        index["files"]["manifest.json.sig"] = piece | {"pieces": [piece]}
        path.with_suffix(".json").write_text(json.dumps(index))

    return write
