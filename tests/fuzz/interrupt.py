"""Interrupt commands at random moments, as Ctrl-C does: each must end with 130 and one word, and leave nothing behind.

    python tests/fuzz/interrupt.py --tries 130 --seed 1

The signal goes alternately to the whole process group, as from a terminal, and to the command alone; afterwards no
process of the group may remain. A command may also end before the signal. An interrupted batch must leave the first of
its records, and the same command must then write the rest. Before precast's first line runs, Python
itself answers the signal; these cases are counted separately.
"""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import campaign

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT_S = 300
# Files that are imported before precast handles interrupts.
EARLY = ("__init__.py", "start.py", "loaders/__init__.py", "loaders/artifact/__init__.py")
EARLY += ("loaders/artifact/interrupt.py",)
# The code of a console script.
START = "import sys; from precast.start import main; sys.exit(main())"
# precast must print none of these.
NOISE = re.compile(
    r"Traceback|Exception ignored|KeyboardInterrupt|Fatal Python error|terminate called|Aborted|error:"
)


@dataclass(frozen=True)
class Command:
    """A command to be interrupted.

    Attributes:
        arguments: command-line arguments.
        made: the artifact that it makes or changes; None if it only reads.
        terminal: True if it runs on a terminal.
        prepare: runs before each run, and is not interrupted.
        requests: those of a batch, whose output must be complete after the next run.
    """

    arguments: Sequence[str]
    made: Path | None = None
    terminal: bool = False
    prepare: Callable[[], object] | None = None
    requests: campaign.Requests | None = None


@dataclass(frozen=True)
class Ended:
    code: int
    said: str
    left: list[str]


def commands(folder: Path, base: Path, checkpoint: Path | None) -> dict[str, Command]:
    """Return the commands by name; include export only if there is a source."""
    url = campaign.store_url(folder)
    names = ("add-target", "add-prefix", "remove-prefix", "export")
    added, prefixed, removed, made = (folder / name / "tiny" for name in names)
    for artifact in (added, prefixed, removed):
        shutil.copytree(base, artifact)
    (folder / "prefix").write_text(campaign.TEXT)
    prefix = (campaign.PREFIX, "--text", str(folder / "prefix"), "--overwrite")
    requests = campaign.Requests.make(folder)
    batch = ("batch", str(base), str(requests.source))
    ids = ("--ids", "1,2,3", "--ignore-eos")
    found = {
        "run": Command(("run", str(base), *ids)),
        "verify": Command(("verify", str(base))),
        "eval": Command(("eval", str(base), "--tokens", "256")),
        "check": Command(("check", str(base))),
        "push": Command(("push", str(base), f"file://{folder}/pushed/tiny"), folder / "pushed" / "tiny"),
        "pull": Command(
            ("pull", url, "-o", str(folder / "pull" / "tiny"), "--overwrite"), folder / "pull" / "tiny"
        ),
        "run of a url": Command(("run", url, *ids)),
        "add-target": Command(("add-target", str(added), "--target", "portable", "--overwrite"), added),
        "add-prefix": Command(("add-prefix", str(prefixed), *prefix), prefixed),
        "remove-prefix": Command(
            ("remove-prefix", str(removed), campaign.PREFIX),
            removed,
            prepare=lambda: campaign.ensure_prefix(removed),
        ),
        "batch": Command((*batch, str(requests.output)), prepare=requests.restart, requests=requests),
        "chat": Command(("run", str(base), "--chat"), terminal=True),
    }
    if checkpoint is not None:
        options = ("--buckets", "8", "--context", "32", "--weights", "float32", "--overwrite")
        found["export"] = Command(("export", str(checkpoint), "-o", str(made), *options), made)
    return found


def start(command: Command) -> tuple[subprocess.Popen[bytes], int | None]:
    """Start a command in its own process group; for one on a terminal, also return the user's end."""
    words = [sys.executable, "-c", START, *command.arguments]
    if not command.terminal:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
        ), None
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, start_new_session=True
    )
    os.close(theirs)
    return process, ours


def run(command: Command, after: float | None, whole_group: bool) -> Ended:
    """Run a command and interrupt it `after` some seconds, or never if None.

    Raises:
        TimeoutExpired: the command does not end.
    """
    if command.prepare is not None:
        command.prepare()
    process, terminal = start(command)
    try:
        if after is not None:
            time.sleep(after)
            if process.poll() is None:
                (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        if terminal is not None:
            # A chat survives an interrupt that ends an answer or a line; the end of input ends it.
            threading.Thread(target=_end_input, args=(process, terminal), daemon=True).start()
        _, said = process.communicate(timeout=LIMIT_S)
        left = _left_in_group(process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if terminal is not None:
            os.close(terminal)
    return Ended(process.returncode, said.decode(errors="replace"), left)


def _end_input(process: "subprocess.Popen[bytes]", terminal: int) -> None:
    with suppress(OSError):
        while process.poll() is None:
            time.sleep(0.3)
            os.write(terminal, b"\x04")


def _left_in_group(group: int) -> list[str]:
    """Return the processes of a group that still run after a few seconds."""
    end = time.monotonic() + 5
    while (found := list(_in_group(group))) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def _in_group(group: int) -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, rest = path.read_text(errors="replace").rsplit(")", 1)
            state, _, its_group = rest.split()[:3]
            if int(its_group) == group and state != "Z":
                yield f"{name})"


def judge(name: str, command: Command, ended: Ended) -> tuple[str, str | None]:
    """Classify the end of a command, and list its faults."""
    said = ended.said
    if ended.code == 130 and said.split()[-1:] == ["interrupted"] and said.count("interrupted") == 1:
        rest = said.rsplit("interrupted", 1)[0]
        return "interrupted", f"said more: {rest[-500:]}" if NOISE.search(rest) else None
    if ended.code == 0 and not NOISE.search(said):
        return "ended before", None
    if ended.code in (1, 130, -signal.SIGINT) and not _lines_of_ours(said):
        return "before it was ready", None
    if command.terminal and ended.code == 130 and not NOISE.search(said):
        return "interrupted", None
    return "wrong", f"exit code {ended.code}: {said[-1500:]}"


def _lines_of_ours(said: str) -> list[str]:
    """Return the places in precast's files that a traceback names, except those that install the handler."""
    early = {str(ROOT / name) for name in EARLY}
    places = re.findall(r'File "([^"]+)"', said)
    return [p for p in places if p.startswith(f"{ROOT}/") and "/.venv/" not in p and p not in early]


def check(command: Command) -> str | None:
    """List faults in a command's result: it must be whole or absent, with nothing beside it."""
    from precast.loaders.artifact.errors import PrecastError
    from precast.loaders.artifact.files import unlisted_files
    from precast.loaders.audit.verify import check_files
    from precast.loaders.locate import read_manifest

    if command.requests is not None:
        return _check_records(command, command.requests)
    made = command.made
    if made is None or not made.parent.exists():
        return None
    if beside := [p.name for p in made.parent.rglob("*") if ".partial" in p.name]:
        return f"left behind: {beside}"
    if not made.exists():
        return None
    try:
        manifest = read_manifest(made)
        problems = check_files(made, manifest, lambda *_: None).problems
        return "; ".join((*problems, *unlisted_files(made, manifest.files))) or None
    except PrecastError as error:
        return str(error)


def _check_records(command: Command, requests: campaign.Requests) -> str | None:
    """List faults in the records of an interrupted batch, and in those of the same batch afterwards."""
    if fault := requests.fault():
        return fault
    again = run(command, None, True)
    if again.code != 0:
        return f"the same command again: exit code {again.code}: {again.said[-1000:]}"
    return requests.fault(complete=True)


def interrupt(name: str, command: Command, tries: int, random: Random) -> tuple[Counter[str], list[str]]:
    """Interrupt a command; return its outcome and its faults."""
    outcomes: Counter[str] = Counter()
    found: list[str] = []
    if command.requests is not None:  # the records of a batch that nobody interrupts
        run(replace(command, arguments=(*command.arguments[:-1], str(command.requests.expected))), None, True)
    started = time.monotonic()
    first = run(command, None, True)
    usual = time.monotonic() - started
    if first.code != 0:
        return outcomes, [f"{name}: not interrupted: exit code {first.code}: {first.said[-1000:]}"]
    for number in range(tries):
        after = random.uniform(0, 1.05 * usual)
        ended = run(command, after, number % 2 == 0)
        outcome, problem = judge(name, command, ended)
        outcomes[outcome] += 1
        problem = problem or check(command) or (f"still running: {ended.left}" if ended.left else None)
        if problem:
            found.append(f"{name}, after {after:.3f} of {usual:.3f} s: {problem}")
    outcomes[f"{usual:.1f} s usually"] += 0
    return outcomes, found


def make_checkpoint(folder: Path) -> Path:
    """Make a small checkpoint in Hugging Face's format."""
    from safetensors.numpy import save_file

    sys.path.insert(0, str(HERE.parent / "golden"))
    import make

    folder.mkdir()
    save_file(make.tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(make.CONFIG))
    (folder / "tokenizer.json").write_bytes(make.tokenizer_json())
    (folder / "chat_template.jinja").write_text(make.TEMPLATE)
    return folder


def main() -> None:
    options = campaign.parse_options(__doc__.splitlines()[0], "tries", 130)
    os.environ["PRECAST_HISTORY"] = "off"

    def prepare(folder: Path) -> dict[str, campaign.Series]:
        needed = not options.artifact or not options.only or "export" in options.only
        checkpoint = make_checkpoint(folder / "checkpoint") if needed else None
        base = options.artifact or _export(folder / "checkpoint", folder / "base")
        campaign.push_base(base, folder)
        return {
            name: partial(interrupt, name, command)
            for name, command in commands(folder, base, checkpoint).items()
        }

    campaign.run("tries", options, prepare)


def _export(checkpoint: Path, artifact: Path) -> Path:
    options = ("--buckets", "8", "--context", "64", "--weights", "float32")
    ended = run(Command(("export", str(checkpoint), "-o", str(artifact), *options)), None, True)
    assert ended.code == 0, ended.said
    return artifact


if __name__ == "__main__":
    main()
