"""Ctrl-C at any moment: one word, exit code 130 and no partial files. This is a short run of `make interrupt`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from precast.loaders.artifact import interrupt

FUZZ = Path(__file__).resolve().parent / "fuzz"
WORD = b"\ninterrupted\n"


def test_interrupted_at_random_moments(tiny_artifact, python):
    only = ("--only", "run,pull,add-prefix,remove-prefix,batch")
    result = python(str(FUZZ / "interrupt.py"), "--artifact", str(tiny_artifact), *only, "--tries", "15")
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["findings"] == 0


def interrupted(code: str, *arguments: object, ignored: bool = False) -> tuple[int, bytes, bytes]:
    """Start code that prints "now" and runs forever, interrupt it, and return its exit code and output."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    if ignored:
        command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"now\n"
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    return process.returncode, out, said


READY = """
import sys, time
from pathlib import Path
from precast.loaders.artifact import interrupt
interrupt.install()
def now():
    print("now", flush=True)
    time.sleep(60)
"""
# Moments at which an exception would be swallowed, reworded, or too late.
MOMENTS = {
    "a destructor": "class A:\n def __del__(self): now()\nA()",
    "a bare except": "try:\n now()\nexcept BaseException:\n time.sleep(60)",
    "an import": "sys.path.insert(0, sys.argv[1])\nimport slow",
    "a callback of C": "sorted([1, 2], key=lambda _: now())",
    "the way out": "import atexit\natexit.register(now)",
    "another thread's end": "import threading\nt = threading.Thread(target=time.sleep, args=(60,))\nt.start()\nnow()",
    "weak references": "import weakref\nclass A: pass\na = A()\nweakref.finalize(a, now)\ndel a",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_prints_one_word_at_any_moment(moment, tmp_path):
    (tmp_path / "slow.py").write_text("import __main__\n__main__.now()")
    assert interrupted(READY + MOMENTS[moment], tmp_path) == (130, b"", WORD)


LONG = {
    "in C": "import hashlib\nprint('now', flush=True)\nhashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)",
    "in C, in a block": (
        "import hashlib\nwith interrupt.on_interrupt(Path(sys.argv[1]).unlink):\n"
        " print('now', flush=True)\n hashlib.pbkdf2_hmac('sha256', b'', b'', 2_000_000_000)"
    ),
}


@pytest.mark.parametrize("work", LONG)
def test_an_interrupt_does_not_wait_for_long_compiled_code(work, tmp_path):
    """Such code can run for half an hour without checking for signals."""
    (tmp_path / "file").write_text("")
    assert interrupted(READY + LONG[work], tmp_path / "file") == (130, b"", WORD)
    assert os.listdir(tmp_path) == ([] if "block" in work else ["file"])


def test_a_handled_interrupt_does_not_end_the_process_later(tmp_path):
    code = READY + (
        "try:\n with interrupt.raise_on_interrupt(): now()\nexcept KeyboardInterrupt: pass\n"
        "time.sleep(2)\nprint('still here')"
    )
    assert interrupted(code) == (0, b"still here\n", b"")


BLOCKS = """
from precast.loaders.artifact import files, folders
target = Path(sys.argv[1]) / "tiny"
def half(path):
    path.write_text("half")
    now()
"""
WORK = {
    "a folder": "with folders.new_folder(target, overwrite=False) as f: half(f / 'manifest.json')",
    "a file": "import os\nos.replace = lambda *_: now()\nfiles.write_atomically(target, b'data')",
    "a piece of a store": (
        "import os\nfrom precast.loaders.store import remote as store_remote\nos.replace = lambda *_: now()\n"
        "store_remote.open_store(f'file://{target}').write('pieces', b'data')"
    ),
}


@pytest.mark.parametrize("work", WORK)
def test_an_interrupt_leaves_nothing_behind(work, tmp_path):
    assert interrupted(READY + BLOCKS + WORK[work], tmp_path) == (130, b"", WORD)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("before", ["write_files", "replace_manifest", None])
def test_an_interrupted_add_target_leaves_the_artifact_whole(before, artifact_copy):
    """After an interrupt before any step or after the last, the artifact is complete and has no extra files."""
    code = f"""
from precast.loaders import artifact_changes as t
from precast.loaders.locate import read_manifest
from precast.loaders.artifact import files
from dataclasses import replace
root = Path(sys.argv[1])
data = (root / "manifest.json").read_bytes()
with t.lock(root, print) as handle:
    artifact = t.LockedArtifact(root=root, handle=handle, data=data, kind=t.TARGETS)
    manifest = read_manifest(root)
    import hashlib
    entry = files.FileEntry(bytes=4, sha256=hashlib.sha256(b"code").hexdigest())
    changed = replace(manifest, files={{**manifest.files, "programs/new/a.xla": entry}})
    with t.record_change(artifact, changed) as folder:
        for step, arguments in (("write_files", ({{"programs/new/a.xla": [b"code"]}},)), ("replace_manifest", ())):
            if step == {before!r}: now()
            getattr(t, step)(artifact, folder, *arguments)
        now()
"""
    from precast.loaders.artifact.files import unlisted_files
    from precast.loaders.locate import read_manifest

    (artifact_copy / "manifest.json.sig").write_text("signed")
    assert interrupted(READY + code, artifact_copy) == (130, b"", WORD)
    manifest = read_manifest(artifact_copy)
    assert ("programs/new/a.xla" in manifest.files) == (before is None)
    assert unlisted_files(artifact_copy, manifest.files) == []


def test_an_ignored_signal_stays_ignored():
    """nohup ignores SIGINT, and so do shells for background jobs."""
    code = READY.replace("time.sleep(60)", "time.sleep(1)") + "now()\nprint('done')"
    assert interrupted(code, ignored=True) == (0, b"done\n", b"")


def test_raise_on_interrupt_raises_keyboard_interrupt():
    code = (
        READY
        + "try:\n with interrupt.raise_on_interrupt(): now()\nexcept KeyboardInterrupt: print('put right')\nnow()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    for expected in (b"now\n", b"put right\n"):
        assert process.stdout.readline() == expected
        if expected == b"now\n":
            process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"now\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", WORD)
    assert process.returncode == 130


def test_a_host_process_keeps_its_own_handler():
    before = signal.getsignal(signal.SIGINT)
    import precast.cli
    import precast.start  # noqa: F401

    with interrupt.on_interrupt(lambda: None):
        assert signal.getsignal(signal.SIGINT) is before
    assert interrupt._CLEAN_UPS == []


def test_a_second_interrupt_does_not_stop_the_clean_up(tmp_path):
    code = READY + (
        "import os, signal\n"
        "def undo():\n os.kill(os.getpid(), signal.SIGINT); time.sleep(0.2); Path(sys.argv[1]).unlink()\n"
        "with interrupt.on_interrupt(undo): now()"
    )
    (tmp_path / "file").write_text("")
    assert interrupted(code, tmp_path / "file") == (130, b"", WORD)
    assert os.listdir(tmp_path) == []


def test_a_failing_clean_up_does_not_stop_the_others(tmp_path):
    code = READY + (
        "with interrupt.on_interrupt(Path(sys.argv[1]).unlink), interrupt.on_interrupt(lambda: 1 / 0): now()"
    )
    (tmp_path / "file").write_text("")
    assert interrupted(code, tmp_path / "file") == (130, b"", WORD)
    assert os.listdir(tmp_path) == []


def test_little_is_imported_before_the_handler_is_installed(python):
    """Until then, Python handles interrupts itself, and each further import extends this time."""
    code = (
        "import json, sys\nbefore = set(sys.modules)\nfrom precast.start import main\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    result = python("-c", code)
    names = ["precast", "precast.loaders", "precast.loaders.artifact"]
    expected = [
        *names,
        "precast.loaders.artifact.interrupt",
        "precast.loaders.console",
        "precast.loaders.console.streams",
        "precast.start",
    ]
    found = json.loads(result.stdout)
    assert [name for name in found if not name.startswith("__editable__")] == expected


def test_a_child_ends_with_its_parent():
    """A child that tries or compiles programs must not be orphaned, however the parent ends."""
    child = "import sys, time; from precast.loaders.compiling.child_process import ready; ready()"
    parent = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child + '; time.sleep(60)'!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\nprint(child.pid, flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while _runs(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_second_interrupt_before_the_first_is_ignored_ends_the_process():
    """``timeout -s INT`` sends two signals, one to the process and one to its group."""
    code = READY + (
        "import os, signal\n"
        "ignore = interrupt.ignore\n"
        "def late():\n interrupt.ignore = ignore; os.kill(os.getpid(), signal.SIGINT); ignore()\n"
        "interrupt.ignore = late\n"
        "now()"
    )
    assert interrupted(code) == (130, b"", WORD)
