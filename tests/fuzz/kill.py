"""Kill commands that write, at random moments: afterwards the artifact must be whole or absent.

    python tests/fuzz/kill.py --kills 200 --seed 1

Each command works in one folder that is never tidied up, so that it meets the remains of killed runs. After every kill
the artifact is loaded and all its files are hashed. After every fifth kill the command runs to its end, which must
succeed and leave nothing beside the artifact. After a kill of a batch, its output must hold the first of the records,
and a complete run all of them. All runs are forked processes, because imports take longer than the work.
"""

import os
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import NoReturn

import campaign

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))  # for `make`
LIMIT_S = 300
# Kills between two complete runs of a command.
EVERY = 5


def check(artifact: Path) -> None:
    """Check that an artifact is whole, and answers."""
    from precast.loaders.generation.sampling_params import SamplingParams
    from precast.loaders.load import load

    model = load(artifact, rehash=True, trusted=True, log=quiet)
    assert len(model.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True)).token_ids) == 2


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        name: name in the table.
        made: the artifact's folder, or the file that the command writes.
        run: runs the command.
        absent: True if `made` may be absent after a kill.
        check: raises an error if `made` is not whole.
        prepare: runs before each run, and is not killed.
    """

    name: str
    made: Path
    run: Callable[[], object]
    absent: bool
    check: Callable[[Path], None] = check
    prepare: Callable[[], object] | None = None


def quiet(_: str) -> None:
    pass


def commands(folder: Path, base: Path) -> list[Command]:
    # Imported before the forks; none of these starts a thread.
    import make

    from precast.exporter.export import export
    from precast.exporter.options import ExportOptions
    from precast.loaders.add_prefix import PrefixSource, add_prefix, remove_prefix
    from precast.loaders.add_target import add_target
    from precast.loaders.store.pull import pull

    names = ("export", "add-target", "pull", "add-prefix", "remove-prefix")
    made, added, pulled, prefixed, removed = (folder / name / "tiny" for name in names)
    for artifact in (added, prefixed, removed):
        shutil.copytree(base, artifact)
    source, requests = PrefixSource(text=campaign.TEXT), campaign.Requests.make(folder)
    options = ExportOptions(buckets=(8,), context=32, weights="bfloat16", overwrite=True)
    url = campaign.store_url(folder)
    return [
        Command("export", made, lambda: export(make.source(), made, options), True),
        Command(
            "add-target",
            added,
            lambda: add_target(added, source="portable", overwrite=True, log=quiet),
            False,
        ),
        Command(
            "pull",
            pulled,
            lambda: pull(
                url, pulled, overwrite=True, require_signature=None, log=quiet, progress=lambda *_: None
            ),
            True,
        ),
        Command(
            "add-prefix",
            prefixed,
            lambda: add_prefix(prefixed, campaign.PREFIX, source, overwrite=True, log=quiet),
            False,
        ),
        Command(
            "remove-prefix",
            removed,
            lambda: remove_prefix(removed, campaign.PREFIX, log=quiet),
            False,
            prepare=lambda: campaign.ensure_prefix(removed),
        ),
        Command(
            "batch",
            requests.output,
            lambda: answer(base, requests),
            True,
            check=lambda _: check_records(requests, complete=False),
            prepare=requests.restart,
        ),
    ]


def answer(artifact: Path, requests: campaign.Requests) -> None:
    """Answer all requests; the first call makes the expected records."""
    from precast.loaders import batch
    from precast.loaders.generation.sampling_params import SamplingParams
    from precast.loaders.load import load

    model = load(artifact, trusted=True, log=quiet)
    if not requests.expected.exists():
        batch.run(model, requests.source, requests.expected, SamplingParams())
        return
    batch.run(model, requests.source, requests.output, SamplingParams())
    check_records(requests, complete=True)


def check_records(requests: campaign.Requests, *, complete: bool) -> None:
    """Check that the output holds the expected records; the first of them, or all."""
    fault = requests.fault(complete=complete)
    assert fault is None, fault


def run_and_exit(function: Callable[[], object]) -> NoReturn:
    """Run a function in a forked child and end the process: with 0, or with a traceback and 1 after an exception."""
    try:
        function()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def in_child(function: Callable[[], object], log: Path, kill_after: float | None = None) -> bool | None:
    """Run a function in a child process; return True if it succeeded, None if the kill came first.

    The kill spares the child's own children, which may go on for a moment.
    """
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        with log.open("wb") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        run_and_exit(function)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    end = time.monotonic() + LIMIT_S
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            log.write_text(f"no end within {LIMIT_S} s")
            return False
        time.sleep(0.002)
    return None if os.WIFSIGNALED(ended[1]) and kill_after is not None else ended[1] == 0


def leftovers(command: Command) -> list[str]:
    """Return the files beside what a command made, and an artifact's unlisted files, after a successful run."""
    from precast.loaders.artifact.files import unlisted_files
    from precast.loaders.locate import read_manifest

    beside = [p.name for p in command.made.parent.iterdir() if p != command.made]
    if not command.made.is_dir():
        return beside
    return beside + unlisted_files(command.made, read_manifest(command.made).files)


def kill(command: Command, kills: int, random: Random, log: Path) -> tuple[Counter[str], list[str]]:
    """Kill a command many times; return the number of each outcome, and the faults."""
    outcomes: Counter[str] = Counter()
    found: list[str] = []

    def expect(what: str, succeeded: bool | None) -> None:
        if not succeeded:
            found.append(f"{command.name}: {what}: {log.read_text(errors='replace')[-1500:]}")

    def prepare() -> None:
        if command.prepare is not None:
            expect("the preparation", in_child(command.prepare, log))

    def run_check(what: str) -> None:
        if not command.absent or os.path.lexists(command.made):
            expect(what, in_child(lambda: command.check(command.made), log))

    prepare()
    started = time.monotonic()
    expect("the first run", in_child(command.run, log))
    usual = time.monotonic() - started
    for count in range(1, kills + 1):
        prepare()
        after = random.uniform(0, 1.1 * usual)
        ended = in_child(command.run, log, after)
        if ended is None:
            outcomes["killed"] += 1
        else:
            expect(f"run {count}, before it was killed", ended)
            outcomes["ended before"] += 1
        there = "there" if command.made.exists() else "absent"
        outcomes[there] += 1
        run_check(f"after kill {count} at {after:.3f} s")
        if count % EVERY == 0 or count == kills:
            prepare()
            expect(f"the run after kill {count}", in_child(command.run, log))
            run_check(f"after the run after kill {count}")
            if left := leftovers(command):
                found.append(f"{command.name}: left after the run after kill {count}: {left}")
        if command.absent and random.random() < 0.3:
            shutil.rmtree(command.made, ignore_errors=True)  # then it is made anew, not replaced
    outcomes[f"{usual:.1f} s usually"] += 0
    return outcomes, found


def main() -> None:
    options = campaign.parse_options(__doc__.splitlines()[0], "kills", 200)

    def prepare(folder: Path) -> dict[str, campaign.Series]:
        base, log = options.artifact or folder / "base", folder / "log"
        if options.artifact is None:
            assert in_child(lambda: _make(base), log), log.read_text()
        assert in_child(lambda: campaign.push_base(base, folder), log), log.read_text()
        return {command.name: partial(kill, command, log=log) for command in commands(folder, base)}

    campaign.run("kills", options, prepare)


def _make(artifact: Path) -> None:
    import make

    make.export_golden(artifact)


if __name__ == "__main__":
    main()
