"""Folders of artifacts: they appear complete or not at all, and disks that fill up lose nothing."""

import builtins
import errno
import io
import os
from pathlib import Path

import pytest

from precast.loaders.artifact import folders
from precast.loaders.artifact.errors import PrecastError


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
def test_a_failure_leaves_nothing_behind_and_loses_nothing(tmp_path, problem, there):
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


def test_an_existing_artifact_is_refused_or_replaced(tmp_path):
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


def test_a_folder_created_during_the_block_is_not_replaced(tmp_path):
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
def test_empty_folders_that_cannot_be_replaced_are_named(tmp_path, monkeypatch, overwrite):
    here, mounted, link = (tmp_path / name for name in ("here", "mounted", "link"))
    here.mkdir()
    mounted.mkdir()
    link.symlink_to(mounted)
    monkeypatch.chdir(here)
    for target in (Path("."), here):
        with pytest.raises(PrecastError, match=r"is the current folder, which cannot be replaced; choose a"):
            make(target, overwrite=overwrite)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == mounted)
    with pytest.raises(
        PrecastError, match="mounted: is a mount point, which cannot be replaced; choose a folder inside"
    ):
        make(mounted, overwrite=overwrite)
    with pytest.raises(PrecastError, match="exists"):
        make(link, overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["here", "link", "mounted"]
    assert os.listdir(here) == os.listdir(mounted) == []


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(
        PrecastError, match=r"cannot be created \((Not a directory|File exists)\); choose another"
    ):
        make(tmp_path / "file" / "target")
    with pytest.raises(PrecastError, match="cannot be created"):
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
    with pytest.raises(PrecastError, match="cannot be created"):
        make(tmp_path / "target")
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert os.listdir(tmp_path) == []


# --- full disks ---------------------------------------------------------------------------------------------


class Disk:
    """A disk with room for a number of operations, after which the next operation, or every later one, fails."""

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
                return original(*arguments, **options)  # reading needs no free space
            self.left -= 1
            if self.left == -1 or (self.left < 0 and not self.once):
                self.refused += 1
                full_disk()
            return original(*arguments, **options)

        return guarded


def run_out(parent: Path, room: int, *, once: bool, there: bool) -> tuple[int, str]:
    """Make a folder on a disk that runs out of space; return the number of failed operations, and the error."""
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
def test_a_disk_that_fills_up_at_any_moment_keeps_the_old_state(tmp_path, there):
    """Let each operation fail in turn: the result is the old state and an error, or the new state and none."""
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


def test_an_old_artifact_that_cannot_be_restored_is_not_lost(tmp_path):
    """From some moment, every write fails, including renames."""
    for room in range(100):
        parent = tmp_path / f"{room}"
        refused, _ = run_out(parent, room, once=False, there=True)
        found = [path.read_text() for path in parent.rglob("manifest.json")]
        assert found in (["old"], ["new"])
        if not refused:
            break
    assert not refused


def test_a_real_full_disk(tmp_path, python):
    """Use a file system of 64 kB in a mount namespace that ends with the process."""
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
    assert message.endswith(
        ": writing stopped (No space left on device), and the unfinished folder was removed; free some space on the"
        " disk, or choose another folder with -o."
    )
    assert (empty, full) == ("[]", "['target']")
