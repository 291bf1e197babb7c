"""Full and read-only disks, and processes that use the same name.

In each case, the artifact is complete, or an error explains why not. A small disk is a tmpfs in a private mount
namespace; the tests are skipped if that is not allowed. `loaders/test_files.py` tests the failure of each single write.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from precast.loaders.artifact import folders

ROOT = Path(__file__).resolve().parent.parent
# The command that runs another one in a mount namespace. In the namespace, any user becomes root.
NAMESPACE = (
    ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
)

HELPERS = """
import json, os, shutil, subprocess, sys
from pathlib import Path
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.load import load
from precast.loaders.generation.sampling_params import SamplingParams

def mount(*arguments):
    subprocess.run(["mount", *map(str, arguments)], check=True)

def answer(path, **options):
    model = load(path, log=lambda _: None, **options)
    return model.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True)).token_ids

def refusal(function):
    try:
        function()
    except PrecastError as error:
        return str(error)
    return ""

artifact, folder = Path(sys.argv[1]), Path(sys.argv[2])
"""


def in_namespace(script: str, *arguments: object) -> list:
    """Run a script that prints JSON in a mount namespace; skip the test if none can be made."""
    allowed = subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    if allowed.returncode:
        pytest.skip("this user may not mount a small disk")
    command = [*NAMESPACE, sys.executable, "-c", HELPERS + script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


FULL = """
from precast.loaders.add_target import add_target
from precast.loaders.store.pull import pull
from precast.loaders.store.push import push

os.environ["PRECAST_CACHE"] = str(folder / "cache")
disk, store = folder / "disk", f"file://{folder}/store/tiny"
for path in (disk, folder / "store"):
    path.mkdir()
push(artifact, store, progress=lambda *_: None)
mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", disk)
total = sum(p.stat().st_size for p in artifact.rglob("*") if p.is_file())

def size(count):
    mount("-o", f"remount,size={count // 1024}k", disk)

def fetch(path):
    pull(store, path, overwrite=False, require_signature=None, log=lambda _: None, progress=lambda *_: None)

said, whole = {}, answer(artifact)
# Have the early check for room find some.
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 40)
for share in (0.1, 0.5, 0.9):
    size(int(total * share))
    said[f"pull {share}"] = refusal(lambda: fetch(disk / "tiny"))
    assert os.listdir(disk) == [], os.listdir(disk)
# The cache of pieces.
os.environ["PRECAST_CACHE"] = str(disk / "cache")
said["pull cache"] = refusal(lambda: fetch(folder / "pulled"))
assert not (folder / "pulled").exists()
shutil.rmtree(disk / "cache")
shutil.disk_usage = usage
os.environ["PRECAST_CACHE"] = str(folder / "cache")
said["pull told before"] = refusal(lambda: fetch(disk / "tiny"))
size(2 * total + 500_000)
fetch(disk / "tiny")
assert answer(disk / "tiny", rehash=True) == whole
# Add a target.
used = usage(disk).used
before = (disk / "tiny" / "manifest.json").read_bytes()
for room in (8192, 40_000):
    size(used + room)
    said[f"add-target {room}"] = refusal(lambda: add_target(disk / "tiny", source="portable", log=lambda _: None))
    assert (disk / "tiny" / "manifest.json").read_bytes() == before
    assert answer(disk / "tiny", rehash=True) == whole
size(used + 4_000_000)
add_target(disk / "tiny", source="portable", log=lambda _: None)
assert answer(disk / "tiny", rehash=True) == whole
# Without room in the cache folder, loads go on without it.
os.environ["PRECAST_CACHE"] = str(disk / "cache")
(disk / "cache").mkdir()
with (disk / "rest").open("wb", buffering=0) as rest:
    try:
        while rest.write(bytes(4096)):
            pass
    except OSError:
        pass
assert answer(artifact, rehash=True) == whole
assert answer(artifact, target="portable", allow_compile=True) == whole
print(json.dumps(said))
"""


def test_a_disk_that_is_full(tiny_artifact, tmp_path):
    """When pull, add-target and run --compile fail, the artifacts still answer; later runs with room succeed."""
    said = in_namespace(FULL, tiny_artifact, tmp_path)
    for share in (0.1, 0.5, 0.9):
        assert "No space left on device" in said[f"pull {share}"]
    assert "No space left on device" in said["pull cache"]
    assert "MB are free; make room" in said["pull told before"]
    assert "No space left on device" in said["add-target 8192"]
    assert "No space left on device" in said["add-target 40000"]


EXPORT = """
sys.path.insert(0, "tests/golden")
import make

os.environ["PRECAST_CACHE"] = str(folder / "cache")
disk = folder / "disk"
disk.mkdir()
mount("-t", "tmpfs", "-o", "size=32k", "tmpfs", disk)
said = []
for room in (32, 96):
    mount("-o", f"remount,size={room}k", disk)
    said.append(refusal(lambda: make.export_golden(disk / "tiny")))
    assert os.listdir(disk) == [], os.listdir(disk)
mount("-o", "remount,size=1m", disk)
make.export_golden(disk / "tiny")
answer(disk / "tiny", rehash=True)
print(json.dumps(said))
"""


def test_an_export_to_a_disk_that_is_full(tiny_artifact, tmp_path):
    for text in in_namespace(EXPORT, tiny_artifact, tmp_path):
        assert text.startswith(
            f"{tmp_path}/disk/tiny: writing stopped (No space left on device), and the unfinished"
        )


READ_ONLY = """
whole = answer(artifact)
mount("--bind", artifact, artifact)
mount("-o", "remount,bind,ro", artifact)
try:
    (artifact / "x").write_text("")
    raise SystemExit("it can be written to")
except OSError:
    pass
assert answer(artifact, rehash=True) == whole
os.environ["PRECAST_CACHE"] = str(artifact / "cache")
assert answer(artifact, rehash=True) == whole
assert answer(artifact, target="portable", allow_compile=True) == whole
from precast.loaders.add_target import add_target
print(json.dumps([refusal(lambda: add_target(artifact, source="portable", log=lambda _: None))]))
"""


def test_an_artifact_that_may_only_be_read(artifact_copy, tmp_path, own_cache):
    """The artifact runs even if the cache folder is read-only too."""
    (text,) = in_namespace(READ_ONLY, artifact_copy, tmp_path)
    assert "Read-only file system" in text


# --- several at one name ------------------------------------------------------------------------------------

# This runs in a new process, because a process with threads, such as those that JAX starts, must not fork.
TWO = """
import json, multiprocessing, os, sys
from pathlib import Path
from precast.loaders.artifact import files, folders
from precast.loaders.artifact.errors import PrecastError

def write(path, text, overwrite, together, said):
    together.wait()
    try:
        with folders.new_folder(path, overwrite=overwrite) as folder:
            for name in ("manifest.json", "weights.safetensors"):
                (folder / name).write_text(text)
    except PrecastError as error:
        said.put(str(error))
    else:
        said.put("")

overwrite, results = bool(int(sys.argv[2])), []
context = multiprocessing.get_context("fork")
for n in range(40):
    path, together, said = Path(sys.argv[1]) / str(n) / "tiny", context.Barrier(2), context.Queue()
    writers = [context.Process(target=write, args=(path, text, overwrite, together, said)) for text in "ab"]
    for writer in writers:
        writer.start()
    texts = sorted(said.get(timeout=60) for _ in writers)
    for writer in writers:
        writer.join()
    contents = [(path / name).read_text() for name in ("manifest.json", "weights.safetensors")]
    results.append([str(path), texts, contents, os.listdir(path.parent)])
print(json.dumps(results))
"""


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_processes_that_export_to_one_name(tmp_path, python, overwrite):
    """One process succeeds: the artifact is entirely its own, and no files of the other process remain."""
    result = python("-c", TWO, str(tmp_path), str(int(overwrite)))
    assert result.returncode == 0, result.stderr
    for path, texts, contents, beside in json.loads(result.stdout):
        assert contents in (["a", "a"], ["b", "b"])
        assert beside == ["tiny"]
        assert texts[0] == ""
        assert texts[1].startswith(f"{path}: exists already; choose another folder" if not overwrite else "")


KILLED = """
import os, sys
from pathlib import Path
from precast.loaders.artifact import files, folders

with folders.new_folder(Path(sys.argv[1]), overwrite=False) as folder:
    (folder / "weights.safetensors").write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_leftovers_of_a_killed_export_are_removed_by_the_next(tmp_path, python):
    assert python("-c", KILLED, str(tmp_path / "tiny")).returncode == -9
    assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]
    with folders.new_folder(tmp_path / "other", overwrite=False) as folder:
        (folder / "manifest.json").write_text("{}")
    assert len(list(tmp_path.glob(".tiny.*.partial"))) == 1, "it belongs to another name"
    with folders.new_folder(tmp_path / "tiny", overwrite=False) as folder:
        (folder / "manifest.json").write_text("{}")
        assert list(tmp_path.glob(".tiny.*.partial")) == [folder.parent]
        with suppress(KeyError), folders.new_folder(tmp_path / "tiny", overwrite=False):
            raise KeyError
        assert folder.is_dir(), "a running export's folder stays"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "tiny"]


def _look_alikes(parent: Path) -> None:
    """Make a user's folders, files, links and pipes with names and contents like temporary folders."""
    mark, text = folders._MARK, folders._MARK_TEXT
    ours = ".tiny.precast-0123456789a{}.partial"
    for name in (
        ".tiny.backup.partial",
        ".tiny.0123456789ab.partial",
        ".tiny.partial",
        ".tiny.precast-0.partial",
    ):
        (parent / name).mkdir()
        (parent / name / mark).write_bytes(text)
    for n, contents in enumerate((b"", text[:-1], text + b"more")):
        (parent / ours.format(n)).mkdir()
        (parent / ours.format(n) / mark).write_bytes(contents)
    (parent / ours.format("9") / "unmarked").mkdir(parents=True)
    (parent / ours.format("a")).write_bytes(text)
    os.mkfifo(parent / ours.format("b"))
    (parent / "elsewhere").mkdir()
    (parent / "elsewhere" / mark).write_bytes(text)
    (parent / ours.format("c")).symlink_to(parent / "elsewhere")
    for n, make in (
        ("d", os.mkfifo),
        ("e", os.mkdir),
        ("f", lambda path: path.symlink_to("../elsewhere/" + mark)),
    ):
        (parent / ours.format(n)).mkdir()
        make(parent / ours.format(n) / mark)


def test_lookalikes_of_temporary_folders_are_kept(tmp_path):
    _look_alikes(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        with folders.new_folder(tmp_path / "tiny", overwrite=overwrite) as folder:
            (folder / "manifest.json").write_text("{}")
    assert [p for p in before if not os.path.lexists(p)] == []
    assert len(list(tmp_path.iterdir())) == len([p for p in before if p.parent == tmp_path]) + 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_temporary_folder_of_another_user_s_is_kept(tmp_path):
    made = folders.temporary_name(tmp_path, "tiny")
    os.close(folders.make_marked(made))
    os.chown(made, 12345, -1)
    with folders.new_folder(tmp_path / "tiny", overwrite=False) as folder:
        (folder / "manifest.json").write_text("{}")
    assert made.is_dir()
    os.chown(made, os.geteuid(), -1)
    folders.remove_leftovers(tmp_path, "tiny")
    assert not made.exists()


def test_the_mark_is_not_part_of_an_artifact(tmp_path):
    with folders.new_folder(tmp_path / "tiny", overwrite=False) as folder:
        (folder / "manifest.json").write_text("{}")
    assert os.listdir(tmp_path / "tiny") == ["manifest.json"]
    assert os.listdir(tmp_path) == ["tiny"]
