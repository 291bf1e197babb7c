"""Files of an artifact: names that stay inside, contents that are checked, folders that appear whole or not at all."""

import builtins
import errno
import hashlib
import io
import os
import time
from pathlib import Path

import pytest

from precast.loaders.artifact import files, folders
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest import FileEntry


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder with a file, a file in a folder, and everything that is no plain file."""
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


def entry_of(path: Path) -> FileEntry:
    return FileEntry(bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


# --- names --------------------------------------------------------------------------------------------------


def test_names_of_plain_files_are_found(root):
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
    with pytest.raises(PrecastError, match="is not the name of a file inside an artifact") as raised:
        files.member_path(root, name)
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize(
    "name", ["link", "link-inside", "inside", "pipe", "linked-folder/b.bin", "outside/secret", "a.bin/x"]
)
def test_what_is_no_plain_file_is_refused(root, name):
    with pytest.raises(PrecastError, match="is not a plain file inside the artifact"):
        files.member_path(root, name)


@pytest.mark.parametrize("name", ["none", "inside/none", "x" * 5000, "\udc80", "x\ud800"])
def test_a_missing_file_is_named(root, name):
    with pytest.raises(PrecastError, match="is missing; copy or export the artifact again") as raised:
        files.member_path(root, name)
    assert repr(name)[:200] in str(raised.value)  # of a long one the middle is left out


# --- contents -----------------------------------------------------------------------------------------------


def test_contents_are_read_when_they_match(root):
    assert files.read_checked(root, "a.bin", entry_of(root / "a.bin")) == b"contents"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"content", "file 'a.bin' has 7 bytes, expected 8; it is truncated or altered"),
        (b"contents!", "file 'a.bin' has 9 bytes, expected 8; it is truncated or altered"),
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


# --- what was verified before -------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """The files that are hashed."""
    seen = []
    original = files.digest_of
    monkeypatch.setattr(files, "digest_of", lambda file: seen.append(Path(file.name)) or original(file))
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


def test_another_expected_hash_is_never_taken_as_verified(root, own_cache, reads):
    entry = entry_of(root / "a.bin")
    checked(root, entry)
    with pytest.raises(PrecastError, match="sha256"):
        checked(root, FileEntry(bytes=entry.bytes, sha256="0" * 64))


def test_a_rewrite_of_the_same_size_with_its_time_set_back_is_noticed(root, own_cache, reads):
    path = root / "a.bin"
    entry, before = entry_of(path), path.stat()
    checked(root, entry)
    time.sleep(0.05)  # more than a tick of the file system's clock
    path.write_bytes(b"Contents")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(PrecastError, match="sha256"):
        checked(root, entry)
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_hashed_is_refused_and_not_remembered(root, own_cache, monkeypatch):
    path, original = root / "a.bin", files.digest_of
    entry = entry_of(path)

    def and_then_change(file):
        digest = original(file)
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


def test_a_failed_check_is_not_remembered(root, own_cache):
    wrong = FileEntry(bytes=8, sha256="0" * 64)
    for _ in range(2):
        with pytest.raises(PrecastError, match="sha256"):
            checked(root, wrong)
    assert not own_cache.exists()


@pytest.mark.parametrize("record", [b"", b"[]", b'"x"', b"{", b'{"sha256": 1}', b"\xff", b"[" * 100_000])
def test_a_broken_record_is_no_record(root, own_cache, reads, record):
    entry = entry_of(root / "a.bin")
    checked(root, entry)
    (path,) = (own_cache / "verified").iterdir()
    path.write_bytes(record)
    checked(root, entry)
    assert len(reads) == 2


def test_a_cache_folder_that_cannot_be_written_is_fine(root, tmp_path, monkeypatch, reads):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("PRECAST_CACHE", str(tmp_path / "file" / "below"))
    entry = entry_of(root / "a.bin")
    assert checked(root, entry) == checked(root, entry)
    assert len(reads) == 2


def test_a_full_cache_disk_is_fine_and_leaves_no_scrap(root, own_cache, monkeypatch):
    entry = entry_of(root / "a.bin")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        checked(root, entry)
    assert list((own_cache / "verified").iterdir()) == []


# --- folders ------------------------------------------------------------------------------------------------


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def fill(folder: Path, text: str = "new") -> None:
    (folder / "manifest.json").write_text(text)
    (folder / "programs" / "cpu").mkdir(parents=True)
    (folder / "programs" / "cpu" / "decode.xla").write_bytes(b"x" * 10_000)


def make(path: Path, *, text: str = "new", overwrite: bool = False) -> None:
    with folders.new_folder(path, overwrite=overwrite) as folder:
        fill(folder, text)


def listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


WHOLE = ["manifest.json", "programs", "programs/cpu", "programs/cpu/decode.xla"]


def test_a_folder_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "target"
    with folders.new_folder(target, overwrite=False) as folder:
        assert folder.parent.parent == target.parent
        fill(folder)
        assert not target.exists()
    assert listing(target) == WHOLE
    assert os.listdir(target.parent) == ["target"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    "problem", [ValueError("no"), KeyboardInterrupt(), PrecastError("no"), SystemExit(1)]
)
@pytest.mark.parametrize("there", [False, True])
def test_whatever_goes_wrong_nothing_is_left_and_nothing_is_lost(tmp_path, problem, there):
    target = tmp_path / "target"
    if there:
        make(target, text="old")

    def work():
        with folders.new_folder(target, overwrite=there) as folder:
            fill(folder)
            raise problem

    with pytest.raises(type(problem)):
        work()
    assert os.listdir(tmp_path) == (["target"] if there else [])
    assert not there or (target / "manifest.json").read_text() == "old"


def test_what_exists_is_refused_or_replaced(tmp_path):
    target = tmp_path / "target"
    make(target, text="old")
    with pytest.raises(
        PrecastError, match="exists already; choose another folder with -o, or replace it with"
    ):
        make(target)
    assert (target / "manifest.json").read_text() == "old"
    (target / "stray").write_text("of the old one")
    make(target, overwrite=True)
    assert listing(target) == WHOLE
    assert (target / "manifest.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["target"]


def test_only_artifacts_are_ever_replaced(tmp_path):
    folder, file, link, real = (tmp_path / name for name in ("folder", "file", "link", "real"))
    folder.mkdir()
    (folder / "thesis.txt").write_text("years")
    file.write_text("years")
    make(real)
    link.symlink_to(real)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    before = listing(tmp_path)
    for target in (folder, file, link, dangling):
        with pytest.raises(
            PrecastError, match="exists and is not an artifact, so --overwrite does not replace it"
        ):
            make(target, overwrite=True)
        with pytest.raises(PrecastError, match="exists already"):
            make(target)
    assert listing(tmp_path) == before


def test_what_appears_while_the_block_runs_is_not_replaced(tmp_path):
    target = tmp_path / "target"

    def work():
        with folders.new_folder(target, overwrite=False) as folder:
            fill(folder)
            target.mkdir()
            (target / "thesis.txt").write_text("years")

    with pytest.raises(PrecastError, match="exists already"):
        work()
    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(target) == ["thesis.txt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_is_filled(tmp_path, overwrite):
    target = tmp_path / "target"
    target.mkdir()
    make(target, overwrite=overwrite)
    assert listing(target) == WHOLE
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_empty_folders_that_nothing_can_replace_are_named(tmp_path, monkeypatch, overwrite):
    here, mounted, link = (tmp_path / name for name in ("here", "mounted", "link"))
    here.mkdir()
    mounted.mkdir()
    link.symlink_to(mounted)
    monkeypatch.chdir(here)
    for target in (Path("."), here):
        with pytest.raises(PrecastError, match=r"is the current folder, which nothing can replace; choose a"):
            make(target, overwrite=overwrite)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == mounted)
    with pytest.raises(
        PrecastError, match="mounted: is a mount point, which nothing can replace; choose a folder in"
    ):
        make(mounted, overwrite=overwrite)
    with pytest.raises(PrecastError, match="exists"):
        make(link, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["here", "link", "mounted"]
    assert os.listdir(here) == os.listdir(mounted) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        PrecastError, match=r"cannot write there \((Not a directory|File exists)\); choose another"
    ):
        make(tmp_path / "file" / "target")
    with pytest.raises(PrecastError, match="cannot write there"):
        make(tmp_path / ("x" * 300))
    assert os.listdir(tmp_path) == ["file"]


def test_a_process_killed_inside_the_block_leaves_no_target(tmp_path, python):
    code = (
        "import os, sys; from pathlib import Path; from precast.loaders.artifact.folders import new_folder\n"
        "with new_folder(Path(sys.argv[1]), overwrite=True) as folder:\n"
        "    (folder / 'manifest.json').write_text('half')\n"
        "    os._exit(9)"
    )
    target = tmp_path / "target"
    assert python("-c", code, str(target)).returncode == 9
    assert not target.exists()
    make(target)
    assert python("-c", code, str(target)).returncode == 9
    assert (target / "manifest.json").read_text() == "new"


def test_a_folder_that_cannot_be_marked_leaves_no_descriptor_open(tmp_path, monkeypatch):
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(PrecastError, match="cannot write there"):
        make(tmp_path / "target")
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert os.listdir(tmp_path) == []


# --- full disks ---------------------------------------------------------------------------------------------


class Disk:
    """Lets so many operations that need room through, and refuses the next one, or all from then on."""

    def __init__(self, patch: pytest.MonkeyPatch, room: int, *, once: bool) -> None:
        self.left, self.once, self.refused = room, once, 0
        for owner, name in (
            (os, "mkdir"),
            (os, "rename"),
            (os, "fsync"),
            (io, "open"),
            (builtins, "open"),
        ):
            patch.setattr(owner, name, self._guarded(getattr(owner, name)))

    def _guarded(self, original):
        def guarded(*arguments, **options):
            mode = arguments[1] if len(arguments) > 1 else options.get("mode", "r")
            if isinstance(mode, str) and "r" in mode and "+" not in mode:
                return original(*arguments, **options)  # reading needs no room
            self.left -= 1
            if self.left == -1 or (self.left < 0 and not self.once):
                self.refused += 1
                full_disk()
            return original(*arguments, **options)

        return guarded


def run_out(parent: Path, room: int, *, once: bool, there: bool) -> tuple[int, str]:
    """Makes a folder on a disk with room for so many operations; returns how many were refused, and the error."""
    parent.mkdir()
    if there:
        make(parent / "target", text="old")
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, room, once=once)
        try:
            make(parent / "target", overwrite=there)
        except PrecastError as error:
            return disk.refused, str(error)
    return disk.refused, ""


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_fills_up_at_any_moment_leaves_what_was(tmp_path, there):
    """Every operation fails once: always the old state and an error, or the new state and none."""
    errors = 0
    for room in range(100):
        parent = tmp_path / f"{room}"
        refused, error = run_out(parent, room, once=True, there=there)
        if error:
            errors += 1
            assert "No space left on device" in error
            assert os.listdir(parent) == (["target"] if there else [])
            assert not there or (parent / "target" / "manifest.json").read_text() == "old"
        else:
            assert os.listdir(parent) == ["target"]
            assert listing(parent / "target") == WHOLE
            assert (parent / "target" / "manifest.json").read_text() == "new"
        if not refused:
            break
    assert not refused
    assert errors >= 7


def test_an_old_artifact_that_cannot_be_put_back_is_not_lost(tmp_path):
    """Nothing at all can be written from some moment on, not even names."""
    for room in range(100):
        parent = tmp_path / f"{room}"
        refused, _ = run_out(parent, room, once=False, there=True)
        found = [path.read_text() for path in parent.rglob("manifest.json")]
        assert found in (["old"], ["new"])
        if not refused:
            break
    assert not refused


def test_a_real_full_disk(tmp_path, python):
    """A file system of 64 kB, mounted in a name space that ends with the process."""
    code = """
import ctypes, os, sys
from pathlib import Path
libc = ctypes.CDLL(None, use_errno=True)
place = sys.argv[1].encode()
if libc.unshare(0x00020000) or libc.mount(None, b"/", None, 0x44000, None):
    sys.exit(77)
if libc.mount(b"none", place, b"tmpfs", 0, b"size=64k"):
    sys.exit(77)
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.folders import new_folder
target = Path(sys.argv[1]) / "target"
try:
    with new_folder(target, overwrite=False) as folder:
        (folder / "manifest.json").write_text("{}")
        (folder / "weights").write_bytes(bytes(1 << 20))
except PrecastError as error:
    print(error)
print(os.listdir(sys.argv[1]))
with new_folder(target, overwrite=False) as folder:
    (folder / "manifest.json").write_text("{}")
print(os.listdir(sys.argv[1]))
"""
    result = python("-c", code, str(tmp_path))
    if result.returncode == 77:
        pytest.skip("mounting is not allowed here")
    assert result.returncode == 0, result.stderr
    message, empty, full = result.stdout.splitlines()
    assert (
        "writing stopped (No space left on device); nothing was left behind: make room and try again."
        in message
    )
    assert (empty, full) == ("[]", "['target']")
