"""Pipes, devices, sockets and folders in place of files: every command ends at once with an error message."""

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from precast.loaders import load as loading
from precast.loaders import signing
from precast.loaders.artifact import files
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.store import cache as store_cache
from precast.loaders.store import pull as store_pull
from precast.loaders.store import push as store_push
from precast.loaders.store import remote as store_remote

LIMIT_S = 60


def _socket(path: Path) -> None:
    # Paths of sockets are limited to about 100 bytes.
    here = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{here}/{path.name}")
    finally:
        os.close(here)


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "socket": _socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.fixture
def instead(own_cache) -> Iterator[Callable[[Path, str], None]]:
    """Yield a function that replaces a file with a pipe, device, socket or folder. At the end, unblock all readers."""
    pipes: list[Path] = []

    def put(path: Path, kind: str) -> None:
        path.unlink()
        KINDS[kind](path)
        pipes.append(path)

    def hangs(*_: object) -> None:
        raise AssertionError(f"no end within {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(LIMIT_S)
    yield put
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    for path in pipes:
        with suppress(OSError):
            os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


@pytest.fixture
def url(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr(store_remote, "_WAITS", (0.0, 0.0, 0.0))
    return f"file://{tmp_path}/store/tiny"


def pull(url: str, folder: Path) -> None:
    store_pull.pull(url, folder, overwrite=True, require_signature=None, log=lambda _: None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["index", "first", "middle", "last"])
def test_in_a_store(instead, url, tiny_artifact, tmp_path, kind, place):
    store_push.push(tiny_artifact, url)
    pieces = sorted(p for p in (tmp_path / "store" / "pieces").rglob("*") if p.is_file())
    places = {"first": 0, "middle": len(pieces) // 2, "last": -1}
    path = tmp_path / "store" / "tiny.json" if place == "index" else pieces[places[place]]
    instead(path, kind)
    with pytest.raises(PrecastError, match="expected a file, found a pipe, a device or a folder; remove"):
        pull(url, tmp_path / "out" / "here")
    assert not (tmp_path / "out" / "here").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_push_writes_a_file_or_fails_with_a_message(instead, url, tiny_artifact, tmp_path, kind):
    store_push.push(tiny_artifact, url)
    for piece in (p for p in (tmp_path / "store" / "pieces").rglob("*") if p.is_file()):
        instead(piece, kind)
        break
    try:
        store_push.push(tiny_artifact, url)
    except PrecastError:
        assert kind == "folder"
        assert not list(piece.iterdir()), "nothing is moved into it"
    else:
        pull(url, tmp_path / "here")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verb", ["load", "push", "verify"])
def test_in_an_artifact(instead, cli, url, artifact_copy, kind, verb):
    acts = {
        "load": lambda: loading.load(artifact_copy, rehash=True, trusted=True),
        "push": lambda: store_push.push(artifact_copy, url),
    }
    names = (
        "manifest.json",
        "weights.safetensors",
        "tokenizer.json",
        "golden.json",
        "programs/cpu/decode.xla",
    )
    for name in names:
        kept = (artifact_copy / name).read_bytes()
        instead(artifact_copy / name, kind)
        if verb == "verify":
            result = cli("verify", artifact_copy)
            assert result.exit_code in (1, 2)
            assert (
                "to be a plain file inside the artifact" in result.output
                or "contains no manifest.json" in result.output
            )
        else:
            with pytest.raises(
                PrecastError, match=r"to be a plain file inside the artifact|contains no manifest\.json"
            ):
                acts[verb]()
        path = artifact_copy / name
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_signature(instead, artifact_copy, tmp_path, kind):
    (artifact_copy / "manifest.json.sig").write_text("{}")
    instead(artifact_copy / "manifest.json.sig", kind)
    monkey = Path(tmp_path / "key.pem")
    monkey.write_text("")
    with pytest.raises(PrecastError):
        signing.check_signature(artifact_copy, (artifact_copy / "manifest.json").read_bytes(), monkey)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_earlier_pulls_that_are_not_files_are_fetched_again(
    instead, url, tiny_artifact, tmp_path, kind
):
    """A pull reuses pieces from folders of earlier pulls, whose files may have been replaced with anything."""
    store_push.push(tiny_artifact, url)
    pull(url, tmp_path / "first")
    for path in sorted(p for p in (tmp_path / "first").rglob("*") if p.is_file()):
        instead(path, kind)
    pull(url, tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    assert loading.read_manifest(tmp_path / "second").name == "tiny"
    assert store_cache.folder().is_dir()


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_replaced_between_its_check_and_its_read(instead, tmp_path, kind):
    (tmp_path / "file").write_text("")
    instead(tmp_path / "file", kind)
    with pytest.raises(OSError, match="not a plain file"):
        files.open_plain(tmp_path / "file")


def test_an_opened_file_has_its_name_and_leaks_no_descriptor(tmp_path):
    (tmp_path / "file").write_bytes(b"contents")
    before = os.listdir("/proc/self/fd")
    with files.open_plain(tmp_path / "file") as file:
        assert (file.name, file.read()) == (str(tmp_path / "file"), b"contents")
    for name in ("", "nothing"):
        with pytest.raises(OSError, match=r"not a plain file|No such file"):
            files.open_plain(tmp_path / name)
    assert os.listdir("/proc/self/fd") == before
