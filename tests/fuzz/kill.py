"""Kill exports, add-targets and pulls at random moments: afterwards the artifact must be whole or absent.

    python tests/fuzz/kill.py --kills 200 --seed 1

Each command works in one folder that is never tidied up, so that it meets the remains of killed runs. After every kill
the artifact is loaded and all its files are hashed. After every fifth kill the command runs to its end, which must
succeed and leave nothing beside the artifact. All runs are forked processes, because imports take longer than the work.
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

import campaign

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))  # for `make`
LIMIT_S = 300
# Kills between two complete runs of a command.
EVERY = 5


@dataclass(frozen=True)
class Command:
    """A command that makes or changes an artifact.

    Attributes:
        name: name in the table.
        artifact: the artifact's folder.
        run: runs the command.
        absent: True if the artifact may be absent after a kill.
    """

    name: str
    artifact: Path
    run: Callable[[], object]
    absent: bool


def quiet(_: str) -> None:
    pass


def commands(folder: Path, base: Path) -> list[Command]:
    # Imported before the forks; none of these starts a thread.
    import make

    from precast.exporter.export import export
    from precast.exporter.options import ExportOptions
    from precast.loaders.add_target import add_target
    from precast.loaders.store.pull import pull

    made, added, pulled = (folder / name / "tiny" for name in ("export", "add-target", "pull"))
    added.parent.mkdir(parents=True)
    shutil.copytree(base, added)
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
    ]


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
        try:
            function()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
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


def check(command: Command) -> None:
    """Check that the artifact is whole, and answers."""
    from precast.loaders.generation.sampling_params import SamplingParams
    from precast.loaders.load import load

    if command.absent and not os.path.lexists(command.artifact):
        return
    model = load(command.artifact, rehash=True, trusted=True, log=quiet)
    assert len(model.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True)).token_ids) == 2


def leftovers(command: Command) -> list[str]:
    """Return the files beside an artifact, and the unlisted ones in it, after a successful command."""
    from precast.loaders.artifact.files import unlisted_files
    from precast.loaders.locate import read_manifest

    beside = [p.name for p in command.artifact.parent.iterdir() if p != command.artifact]
    return beside + unlisted_files(command.artifact, read_manifest(command.artifact).files)


def kill(command: Command, kills: int, random: Random, log: Path) -> tuple[Counter[str], list[str]]:
    """Kill a command many times; return the number of each outcome, and the faults."""
    outcomes: Counter[str] = Counter()
    found: list[str] = []

    def expect(what: str, succeeded: bool | None) -> None:
        if not succeeded:
            found.append(f"{command.name}: {what}: {log.read_text(errors='replace')[-1500:]}")

    started = time.monotonic()
    expect("the first run", in_child(command.run, log))
    usual = time.monotonic() - started
    for count in range(1, kills + 1):
        after = random.uniform(0, 1.1 * usual)
        ended = in_child(command.run, log, after)
        if ended is None:
            outcomes["killed"] += 1
        else:
            expect(f"run {count}, before it was killed", ended)
            outcomes["ended before"] += 1
        there = "there" if command.artifact.exists() else "absent"
        outcomes[there] += 1
        expect(f"after kill {count} at {after:.3f} s", in_child(lambda: check(command), log))
        if count % EVERY == 0 or count == kills:
            expect(f"the run after kill {count}", in_child(command.run, log))
            expect(f"after the run after kill {count}", in_child(lambda: check(command), log))
            if left := leftovers(command):
                found.append(f"{command.name}: left after the run after kill {count}: {left}")
        if command.absent and random.random() < 0.3:
            shutil.rmtree(command.artifact, ignore_errors=True)  # then it is made anew, not replaced
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
