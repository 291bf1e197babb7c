"""A process that meets mutated artifacts, watched from inside (an audit hook) and from outside (`run.py`).

    python worker.py BASE FOLDER

It reads lines of JSON (`kind`, `seed`, `trusted`) from standard input and answers each with a line.
"""

import base64
import hashlib
import json
import os
import resource
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import kinds

from precast.loaders import signing
from precast.loaders.artifact import cache_folder, files
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest import Prefix
from precast.loaders.compiling import trial
from precast.loaders.console import inspect
from precast.loaders.generation.model import Model
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.generation.stored_prefixes import open_prefix
from precast.loaders.load import load

# What a case may take beyond a process that has loaded and run the artifact.
MEMORY = 2 << 30
LONGEST_MESSAGE = 4100
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


# By event, the places that it changes: which argument names one, which the folder (a descriptor) that the name is
# relative to, and whether a link there is followed. Where a symbolic link leads is no matter until somebody follows it;
# a hard link is another name by which the file itself may be changed, so that file counts.
CHANGES: Mapping[str, tuple[tuple[int, int | None, bool], ...]] = {
    "os.remove": ((0, 1, False),),
    "os.rmdir": ((0, 1, False),),
    "os.mkdir": ((0, 2, False),),
    "os.rename": ((0, 2, False), (1, 3, False)),
    "os.link": ((0, 2, False), (0, 2, True), (1, 3, False)),
    "os.symlink": ((1, 2, False),),
    "os.truncate": ((0, None, True),),
    "os.chmod": ((0, 2, True),),
    "os.chown": ((0, 3, True),),
    "os.utime": ((0, 3, True),),
}


class Guard:
    """Notes what a case opens, starts or changes where it has no business."""

    def __init__(self, allowed: tuple[Path, ...], written: tuple[Path, ...]) -> None:
        self._read = tuple(f"{os.path.realpath(p)}{os.sep}" for p in (*allowed, *written))
        self._written = tuple(f"{os.path.realpath(p)}{os.sep}" for p in written)
        self.active, self.children, self.found = False, False, list[str]()
        self._thread, self._os_open = threading.local(), os.open
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active or getattr(self._thread, "looks", False):
            return
        self._thread.looks = True  # what this thread does to look at an event is none
        try:
            if event == "open":
                self._opened(*args)
            elif event in CHANGES:
                for name, folder, follow in CHANGES[event]:
                    at = -1 if folder is None else args[folder]
                    self._check(event, args[name], self._written, at=at, follow=follow)
            elif event.startswith(
                ("socket.", "os.system", "os.exec", "pty.", "ftplib", "urllib", "webbrowser", "pickle.")
            ) or (event == "subprocess.Popen" and not self.children):
                self.found.append(f"{event} {args!r:.200}")
        finally:
            self._thread.looks = False

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        """`os.open`, of which the event does not say what folder the name is relative to."""
        self._thread.folder = dir_fd
        try:
            return self._os_open(path, flags, mode, dir_fd=dir_fd)
        finally:
            self._thread.folder = None

    def _opened(self, path: Any, mode: Any, flags: int) -> None:
        written = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        folder = getattr(self._thread, "folder", None)
        at = -1 if folder is None else folder
        self._check("open", path, self._written if written else self._read, at=at, follow=True)

    def _check(self, event: str, path: Any, allowed: tuple[str, ...], *, at: int, follow: bool) -> None:
        if isinstance(path, int):
            return  # it was looked at when it was opened
        try:
            real = where(os.fsdecode(path), at, follow=follow)
        except (OSError, ValueError):
            return  # no such descriptor, or no such name: nothing comes of it
        if not f"{real}{os.sep}".startswith(allowed) and real not in ("/dev/null", "/dev/urandom"):
            self.found.append(f"{event} {real!r:.300}")

    @contextmanager
    def watching(self, *, children: bool) -> Iterator[None]:
        self.found, self.children, self.active = [], children, True
        os.open = self._open
        try:
            yield
        finally:
            os.open, self.active = self._os_open, False


def where(path: str, at: int, *, follow: bool) -> str:
    """Where a name leads that is relative to an open folder, or with -1 to the current one.

    Raises:
        OSError: when there is no such descriptor.
    """
    if at >= 0:
        path = os.path.join(os.readlink(f"/proc/self/fd/{at}"), path)
    folder, name = os.path.split(path.rstrip(os.sep))
    if follow or name in ("", ".", ".."):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(folder), name)


class Place:
    """The folder in which artifacts are made, next to one that must not be read."""

    def __init__(self, base: kinds.Base, folder: Path) -> None:
        self.base, self.root = base, folder / "artifact"
        for path in (self.root, folder / "outside"):
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(base.root, path)
        (folder / "outside" / "secret").write_bytes(b"secret")
        self.store, self.pulled = folder / "store", folder / "pulled"
        for data in base.files.values():
            digest = hashlib.sha256(data).hexdigest()
            piece = self.store / "pieces" / digest[:2] / digest
            piece.parent.mkdir(parents=True, exist_ok=True)
            piece.write_bytes(data)

    def offer(self, index: bytes) -> None:
        """Puts an index into the store."""
        (self.store / "tiny.json").write_bytes(index)

    def apply(self, changes: dict[str, kinds.Change]) -> None:
        for name, change in changes.items():
            path = self.root / name
            # Below something that is a link or a pipe by now, nothing can be placed.
            with suppress(OSError):
                self._remove(path)
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(change, bytes):
                    path.write_bytes(change)
                elif change is not None:
                    self._place(path, change)

    def _remove(self, path: Path) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            with suppress(OSError):
                path.unlink()

    def _place(self, path: Path, change: kinds.Special) -> None:
        if change.kind == "link":
            path.symlink_to(change.to)
        elif change.kind == "pipe":
            os.mkfifo(path)
        elif change.kind == "folder":
            path.mkdir()
        else:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))

    def restore(self, changes: dict[str, kinds.Change]) -> None:
        odd = {n for n, c in changes.items() if not isinstance(c, bytes)} | (
            set(changes) - set(self.base.files)
        )
        if odd:
            shutil.rmtree(self.root)
            shutil.copytree(self.base.root, self.root)
            return
        for name in changes:
            (self.root / name).write_bytes(self.base.files[name])


class Problems:
    """What went wrong in a case."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.refused = 0

    def attempt(self, step: str, function: Callable[[], Any]) -> Any:
        """Its result; None where it refuses in a proper sentence, or where that is a finding."""
        try:
            return function()
        except PrecastError as error:
            self.refused += 1
            self._check_message(step, str(error))
        except BaseException as error:
            place = error.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else "?"
            self.found.append(f"{step}: {type(error).__name__} at {where}: {str(error)!r:.200}")
        return None

    def _check_message(self, step: str, text: str) -> None:
        if len(text) > LONGEST_MESSAGE:
            self.found.append(f"{step}: a message of {len(text)} characters: {text[:200]!r}")
        elif any(
            ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 or c in "\u2028\u2029"
            for c in text
        ):
            self.found.append(f"{step}: a message with control characters: {text[:300]!r}")


def exercise(root: Path, case: kinds.Case, problems: Problems, *, trusted: bool) -> str:
    """Loads an artifact and uses all of it; "loaded" or "refused"."""
    attempt = problems.attempt
    text = attempt("inspect", lambda: inspect.render(root, as_json=False))
    if text is not None and any(not c.isprintable() and c != "\n" for c in text):
        problems.found.append(f"inspect: control characters in what it shows: {text[:300]!r}")
    attempt("inspect", lambda: json.loads(inspect.render(root, as_json=True).encode()))
    _golden(root, attempt)
    model = attempt(
        "load",
        lambda: load(
            root,
            allow_compile=case.allow_compile,
            rehash=case.rehash,
            trusted=trusted,
            target=case.target,
            log=lambda _: None,
        ),
    )
    if model is None:
        return "refused"
    few = SamplingParams(ignore_eos=True, max_tokens=3)
    attempt("default sampling", model.default_sampling)
    attempt("generate", lambda: model.generate([1, 2, 3], few))
    attempt("generate", lambda: model.generate(list(range(1, 20)), few))
    for text in case.texts:
        attempt("encode", lambda: model.tokenizer.encode(text))  # noqa: B023 - called at once
    attempt("generate text", lambda: model.generate("the cat", SamplingParams(max_tokens=3)))
    attempt("stream", lambda: _stream(model.tokenizer))
    attempt("chat", lambda: model.chat_prompt(MESSAGES))
    for prefix in model.manifest.prefixes[:3]:
        attempt("prefix", lambda: _after(model, root, prefix, few))  # noqa: B023 - called at once
    return "loaded"


def _after(model: Model, root: Path, prefix: Prefix, params: SamplingParams) -> None:
    """Continue a prompt that begins with a stored prefix."""
    tokens = open_prefix(root, model.manifest, prefix).tokens
    model.generate([*tokens[: model.engine.context - 4], 3], params)


def check_signature(place: Place, key: Path, problems: Problems) -> str:
    """Asks for the signature of whoever made the whole artifact; "accepted" or "refused"."""
    manifest = (place.root / kinds.MANIFEST).read_bytes()
    problems.attempt("signature", lambda: signing.check_signature(place.root, manifest, key))
    if problems.found or problems.refused:
        return "refused"
    if manifest != place.base.files[kinds.MANIFEST]:
        problems.found.append("signature: it was accepted for another manifest")
    signature = (place.root / kinds.SIGNATURE).read_bytes()
    if signed_bytes(signature) != signed_bytes(place.base.files[kinds.SIGNATURE]):
        problems.found.append("signature: it was accepted over another statement than was signed")
    return "accepted"


def signed_bytes(signature: bytes) -> bytes | None:
    """What a signature is over: the statement in it, however it is written there; None where there is none."""
    try:
        return base64.b64decode(json.loads(signature)["dsseEnvelope"]["payload"])
    except (KeyError, TypeError, ValueError):
        return None


def pull(place: Place, problems: Problems) -> str:
    """Pulls the artifact by the index that is there; "loaded" or "refused"."""
    from precast.loaders.store.pull import pull as pull_from

    folder, silent = place.pulled / "tiny", lambda *_: None
    url = f"file://{place.store}/tiny"
    moved = problems.attempt(
        "pull",
        lambda: pull_from(url, folder, overwrite=True, require_signature=None, log=silent, progress=silent),
    )
    if moved is None:
        if folder.exists():
            problems.found.append("pull: it was refused, and left a folder")
        return "refused"
    problems.attempt("load what was pulled", lambda: load(folder, rehash=True, trusted=True, log=silent))
    if problems.refused:
        problems.found.append("pull: what was pulled is not whole")
    return "loaded"


def _golden(root: Path, attempt: Callable[[str, Callable[[], Any]], Any]) -> None:
    from precast.loaders.artifact.golden import parse_golden
    from precast.loaders.locate import read_manifest

    def read() -> None:
        manifest = read_manifest(root)
        entry = manifest.files[manifest.golden]
        parse_golden(files.read_checked(root, manifest.golden, entry), manifest, "golden.json")

    attempt("golden", read)


def _stream(tokenizer: Any) -> None:
    stream = tokenizer.stream()
    for token in range(300):
        stream.push(token)
    stream.finish()
    tokenizer.decode(range(300))


def warm_up(root: Path, base: kinds.Base) -> None:
    """Whatever is imported or allocated once is there before anything is watched."""
    problems = Problems()
    exercise(root, kinds.Case(changes={}, texts=kinds.TEXTS), problems, trusted=True)
    names = [t["name"] for t in base.manifest["targets"] if any(p["stablehlo"] for p in t["programs"])]
    case = kinds.Case(changes={}, allow_compile=True, target=names[-1])
    exercise(root, case, problems, trusted=True)
    if problems.found:
        raise SystemExit(f"the whole artifact fails: {problems.found}")


def limit_memory() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    base, folder = kinds.Base.read(Path(sys.argv[1])), Path(sys.argv[2]).resolve()
    # What is printed by anything else goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ |= {"PRECAST_CACHE": str(folder / "cache"), "RUST_BACKTRACE": "0"}
    tempfile.tempdir = str(folder / "temporary")
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    trial.START_S = 20
    place = Place(base, folder)
    warm_up(place.root, base)
    limit_memory()
    checkout = Path(__file__).resolve().parents[2]
    allowed = (
        place.root,
        checkout,
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path("/proc/self"),
        Path("/proc/meminfo"),
        Path("/proc/sys/vm/overcommit_memory"),
        Path("/usr/share/zoneinfo"),
    )
    written = (cache_folder.cache_folder(), Path(tempfile.tempdir), place.pulled)
    whole_index = json.dumps(base.index).encode()
    place.offer(whole_index)
    pull(place, Problems())  # imports what pulling takes
    shutil.rmtree(place.pulled)
    key = kinds.key_of(base.root)
    if key.exists():
        check_signature(place, key, Problems())
    guard = Guard((*allowed, key.parent, place.store, Path("/sys"), Path(f"/proc/{os.getpid()}")), written)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        case = kinds.make(base, asked["kind"], asked["seed"])
        problems, started = Problems(), time.perf_counter()
        try:
            place.apply(dict(case.changes))
            place.offer(case.index or whole_index)
            with guard.watching(children=case.allow_compile or not asked["trusted"]):
                if case.index is not None:
                    outcome = pull(place, problems)
                elif case.signed:
                    outcome = check_signature(place, key, problems)
                else:
                    outcome = exercise(place.root, case, problems, trusted=asked["trusted"])
            found = [*problems.found, *guard.found]
        finally:
            place.restore(dict(case.changes))
            shutil.rmtree(place.pulled, ignore_errors=True)
        took = time.perf_counter() - started
        print(json.dumps({"outcome": outcome, "found": found, "seconds": took}), file=answers, flush=True)


if __name__ == "__main__":
    main()
