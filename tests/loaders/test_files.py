"""Files of an artifact: safe names and checked contents."""

import errno
import hashlib
import os
import time
from pathlib import Path

import pytest

from precast.loaders.artifact import files
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest import FileEntry


@pytest.fixture
def root(tmp_path) -> Path:
    """Make a folder with a file, a nested file, and one file of each kind that is not regular."""
    root = tmp_path / "artifact"
    (root / "inside").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "a.bin").write_bytes(b"contents")
    (root / "inside" / "b.bin").write_bytes(b"b")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "link-inside").symlink_to(root / "a.bin")
    (root / "linked-folder").symlink_to(root / "inside")
    (root / "outside").symlink_to(tmp_path)
    os.mkfifo(root / "pipe")
    return root


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def entry_of(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


# --- names --------------------------------------------------------------------------------------------------


def test_names_of_regular_files_are_found(root):
    assert files.member_path(root, "a.bin") == root / "a.bin"
    assert files.member_path(root, "inside/b.bin") == root / "inside" / "b.bin"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/",
        "/etc/passwd",
        "//etc/passwd",
        "../secret",
        "inside/../a.bin",
        "inside/../../secret",
        "./a.bin",
        "inside//b.bin",
        "inside/",
        "inside/./b.bin",
        "..\\secret",
        "inside\\b.bin",
        "C:\\a.bin",
        "a.bin\0",
        "\0",
    ],
)
def test_names_that_may_leave_the_folder_are_refused(root, name):
    with pytest.raises(PrecastError, match="is not a valid name for a file of an artifact") as raised:
        files.member_path(root, name)
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize(
    "name", ["link", "link-inside", "inside", "pipe", "linked-folder/b.bin", "outside/secret", "a.bin/x"]
)
def test_anything_but_a_regular_file_is_refused(root, name):
    with pytest.raises(PrecastError, match="to be a plain file inside the artifact"):
        files.member_path(root, name)


@pytest.mark.parametrize("name", ["none", "inside/none", "x" * 5000, "\udc80", "x\ud800"])
def test_a_missing_file_is_named(root, name):
    with pytest.raises(PrecastError, match="is missing; copy or export the artifact again") as raised:
        files.member_path(root, name)
    assert repr(name)[:200] in str(raised.value)  # the message leaves out the middle of a long name


# --- contents -----------------------------------------------------------------------------------------------


def test_contents_are_read_when_they_match(root):
    assert files.read_checked(root, "a.bin", entry_of(root / "a.bin")) == b"contents"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"content", "file 'a.bin' has 7 bytes, expected 8; it has been truncated or altered"),
        (b"contents!", "file 'a.bin' has 9 bytes, expected 8; it has been truncated or altered"),
        (b"Contents", "file 'a.bin' has sha256 "),
    ],
)
def test_altered_contents_are_refused(root, own_cache, data, text):
    entry = entry_of(root / "a.bin")
    (root / "a.bin").write_bytes(data)
    for check in (lambda: files.read_checked(root, "a.bin", entry), lambda: checked(root, entry)):
        with pytest.raises(PrecastError) as raised:
            check()
        assert text in str(raised.value)
        assert str(raised.value).endswith("copy or export the artifact again.")


def test_a_file_that_cannot_be_read_is_named(root, own_cache, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    entry = entry_of(root / "a.bin")
    monkeypatch.setattr(files, "open_plain", refuse)
    for check in (files.read_checked, lambda *a: files.open_checked(*a, rehash=False)):
        with pytest.raises(PrecastError, match=r"'a\.bin' cannot be read \(Permission denied\)"):
            check(root, "a.bin", entry)


# --- recorded hashes ----------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """Return a list to which the name of each hashed file is added."""
    seen = []
    original = files.digest_of
    monkeypatch.setattr(
        files, "digest_of", lambda file, *rest: seen.append(Path(file.name)) or original(file, *rest)
    )
    return seen


def checked(root: Path, entry: FileEntry, *, rehash: bool = False) -> Path:
    with files.open_checked(root, "a.bin", entry, rehash=rehash) as file:
        assert file.tell() == 0
        return Path(file.name)


def test_a_file_that_has_not_changed_is_hashed_once(root, own_cache, reads):
    entry = entry_of(root / "a.bin")
    assert checked(root, entry) == checked(root, entry) == root / "a.bin"
    assert len(reads) == 1
    checked(root, entry, rehash=True)
    assert len(reads) == 2


def test_a_recorded_hash_does_not_satisfy_another_expected_hash(root, own_cache, reads):
    entry = entry_of(root / "a.bin")
    checked(root, entry)
    with pytest.raises(PrecastError, match="sha256"):
        checked(root, FileEntry(bytes=entry.bytes, sha256="0" * 64))


def test_a_rewrite_of_the_same_size_with_its_time_set_back_is_detected(root, own_cache, reads):
    path = root / "a.bin"
    entry, before = entry_of(path), path.stat()
    checked(root, entry)
    time.sleep(0.05)  # longer than a tick of the file system's clock
    path.write_bytes(b"Contents")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(PrecastError, match="sha256"):
        checked(root, entry)
    assert len(reads) == 2


def test_a_file_that_changes_during_hashing_is_refused_and_not_recorded(root, own_cache, monkeypatch):
    path, original = root / "a.bin", files.digest_of
    entry = entry_of(path)

    def and_then_change(file, *rest):
        digest = original(file, *rest)
        time.sleep(0.05)
        path.write_bytes(b"Contents")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(files, "digest_of", and_then_change)
        with pytest.raises(
            PrecastError, match=r"a\.bin: was written to while it was in use; load the artifact again"
        ):
            checked(root, entry)
    with pytest.raises(PrecastError, match="sha256"):
        checked(root, entry)


def test_a_failed_check_is_not_recorded(root, own_cache):
    wrong = FileEntry(bytes=8, sha256="0" * 64)
    for _ in range(2):
        with pytest.raises(PrecastError, match="sha256"):
            checked(root, wrong)
    assert not own_cache.exists()


@pytest.mark.parametrize("record", [b"", b"[]", b'"x"', b"{", b'{"sha256": 1}', b"\xff", b"[" * 100_000])
def test_a_broken_record_is_ignored(root, own_cache, reads, record):
    entry = entry_of(root / "a.bin")
    checked(root, entry)
    (path,) = (own_cache / "verified").iterdir()
    path.write_bytes(record)
    checked(root, entry)
    assert len(reads) == 2


def test_an_unwritable_cache_folder_is_ignored(root, tmp_path, monkeypatch, reads):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("PRECAST_CACHE", str(tmp_path / "file" / "below"))
    entry = entry_of(root / "a.bin")
    assert checked(root, entry) == checked(root, entry)
    assert len(reads) == 2


def test_a_full_cache_disk_is_ignored_and_keeps_no_partial_file(root, own_cache, monkeypatch):
    entry = entry_of(root / "a.bin")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        checked(root, entry)
    assert list((own_cache / "verified").iterdir()) == []
