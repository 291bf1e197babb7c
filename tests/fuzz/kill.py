"""Kills exports, add-targets and pulls at random moments: what is there afterwards is a whole artifact, or none.

    python tests/fuzz/kill.py --kills 200 --seed 1

The three share a folder each that is never tidied up, so that what one left is there for the next. After every kill the
artifact is loaded with all its hashes checked; after every fifth the command runs to its end, which must succeed and
leave nothing beside the artifact. Everything runs in forked processes: imports, which take longer than the work, are
done once.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
LIMIT_S = 300
# After how many kills a command runs to its end.
EVERY = 5


@dataclass(frozen=True)
class Command:
    """Something that makes or changes an artifact.

    Attributes:
        name: for the table.
        artifact: the folder that it makes or changes.
        run: does it.
        absent: whether there may be no artifact after a kill.
    """

    name: str
    artifact: Path
    run: Callable[[], object]
    absent: bool


def quiet(_: str) -> None:
    pass


def commands(folder: Path, base: Path) -> list[Command]:
    sys.path.insert(0, str(HERE.parent / "golden"))
    import make

    # Imported before anything forks; none of these starts a thread.
    from precast.exporter.export import export
    from precast.exporter.options import ExportOptions
    from precast.loaders.add_target import add_target
    from precast.loaders.store.pull import pull

    made, added, pulled = (folder / name / "tiny" for name in ("export", "add-target", "pull"))
    added.parent.mkdir(parents=True)
    shutil.copytree(base, added)
    options = ExportOptions(buckets=(8,), context=32, weights="bfloat16", overwrite=True)
    url = f"file://{folder}/store/tiny"
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
    """Runs a function in a process of its own: whether it succeeded; None where it was killed first.

    With its children, where it has some, and without: they may go on for a moment.
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
    """The artifact is whole, and answers."""
    from precast.loaders.generation.sampling_params import SamplingParams
    from precast.loaders.load import load

    if command.absent and not os.path.lexists(command.artifact):
        return
    model = load(command.artifact, rehash=True, trusted=True, log=quiet)
    assert len(model.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True)).token_ids) == 2


def leftovers(command: Command) -> list[str]:
    """What stands beside an artifact, or in it without being listed, after a command has ended well."""
    from precast.loaders.artifact.files import unlisted_files
    from precast.loaders.locate import read_manifest

    beside = [p.name for p in command.artifact.parent.iterdir() if p != command.artifact]
    return beside + unlisted_files(command.artifact, read_manifest(command.artifact).files)


def kill(command: Command, kills: int, random: Random, log: Path) -> tuple[Counter[str], list[str]]:
    """What came of the kills, and what was wrong."""
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
            shutil.rmtree(command.artifact, ignore_errors=True)  # so that it is made anew, not replaced
    outcomes[f"{usual:.1f} s usually"] += 0
    return outcomes, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=("export", "add-target", "pull"))
    parser.add_argument(
        "--artifact", type=Path, help="one to pull and to add targets to; default: a tiny one is made"
    )
    options = parser.parse_args()
    folder, started = Path(tempfile.mkdtemp(prefix="precast-kill-")), time.monotonic()
    os.environ["PRECAST_CACHE"] = str(folder / "cache")
    found: list[str] = []
    try:
        base = options.artifact or folder / "base"
        log = folder / "log"
        if options.artifact is None:
            sys.path.insert(0, str(HERE.parent / "golden"))
            import make

            assert in_child(lambda: make.export_golden(base), log), log.read_text()
        assert in_child(lambda: _push(base, folder), log), log.read_text()
        chosen = [c for c in commands(folder, base) if options.only in (None, c.name)]
        for number, command in enumerate(chosen):
            kills = (options.kills + number) // len(chosen)
            outcomes, wrong = kill(command, kills, Random(f"{command.name}:{options.seed}"), log)
            found += wrong
            print(
                f"{command.name:<10}  {kills} kills  {len(wrong)} findings  "
                + ", ".join(f"{count} {what}" if count else what for what, count in outcomes.items()),
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for text in found[:20]:
        print(text)
    seconds = round(time.monotonic() - started)
    print(json.dumps({"kills": options.kills, "findings": len(found), "seconds": seconds}))
    sys.exit(1 if found else 0)


def _push(base: Path, folder: Path) -> None:
    from precast.loaders.store.push import push

    (folder / "store").mkdir()
    push(base, f"file://{folder}/store/tiny", progress=lambda *_: None)


if __name__ == "__main__":
    main()
