"""The frame of kill.py and interrupt.py: attempts at random moments, a line for each command, and a line of JSON.

Both campaigns share the requests of batches and the prefix that commands add and remove.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import NoReturn

# Name and text of the prefix.
PREFIX, TEXT = "cat", "the cat"
# Makes a number of attempts at a command; returns the number of each outcome, and a text for each fault.
Series = Callable[[int, Random], tuple[Counter[str], list[str]]]


def parse_options(description: str, noun: str, default: int) -> argparse.Namespace:
    """Parse the command line.

    Args:
        description: text for --help.
        noun: plural name of the attempts, and of the option for their number.
        default: number of attempts.

    Returns:
        Options `count`, `seed`, `only` (names of commands; empty for all) and `artifact`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(f"--{noun}", dest="count", type=int, default=default, help="number in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only", type=lambda names: names.split(","), default=[], help="commands, with commas"
    )
    parser.add_argument("--artifact", type=Path, help="artifact to work on; a tiny one is made by default")
    return parser.parse_args()


def run(noun: str, options: argparse.Namespace, prepare: Callable[[Path], Mapping[str, Series]]) -> NoReturn:
    """Run all series, print the results, and exit with 1 if there are faults.

    Args:
        noun: plural name of the attempts.
        options: result of `parse_options`.
        prepare: returns the series by command, given a folder for their files.
    """
    folder, started = Path(tempfile.mkdtemp(prefix=f"precast-{noun}-")), time.monotonic()
    os.environ["PRECAST_CACHE"] = str(folder / "cache")
    faults: list[str] = []
    try:
        prepared = prepare(folder)
        chosen = {name: series for name, series in prepared.items() if name in (options.only or prepared)}
        for number, (name, series) in enumerate(chosen.items()):
            count = (options.count + number) // len(chosen)
            outcomes, found = series(count, Random(f"{name}:{options.seed}"))
            faults += found
            told = ", ".join(f"{times} {what}" if times else what for what, times in outcomes.items())
            print(f"{name:<13}  {count} {noun}  {len(found)} findings  {told}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for text in faults[:20]:
        print(text)
    seconds = round(time.monotonic() - started)
    print(json.dumps({noun: options.count, "findings": len(faults), "seconds": seconds}))
    sys.exit(1 if faults or not chosen else 0)


def store_url(folder: Path) -> str:
    """Return the URL at which `push_base` puts an artifact."""
    return f"file://{folder}/store/tiny"


def push_base(base: Path, folder: Path) -> None:
    """Push an artifact to a store in the folder."""
    from precast.loaders.store.push import push

    (folder / "store").mkdir()
    push(base, store_url(folder), progress=lambda _: None)


def ensure_prefix(artifact: Path) -> None:
    """Add the prefix to an artifact that does not have it."""
    from precast.loaders.add_prefix import PrefixSource, add_prefix
    from precast.loaders.locate import read_manifest

    if PREFIX not in {prefix.name for prefix in read_manifest(artifact).prefixes}:
        add_prefix(artifact, PREFIX, PrefixSource(text=TEXT), log=lambda _: None)


@dataclass(frozen=True)
class Requests:
    """A file of requests, and the records of two batches that answer them.

    Attributes:
        source: the requests.
        output: the records of the batch that is stopped.
        expected: the records of the batch that is not stopped.
    """

    source: Path
    output: Path
    expected: Path

    @staticmethod
    def make(folder: Path, count: int = 200) -> "Requests":
        """Write the requests, of which every second one begins with the prefix."""
        made = Requests(
            folder / "requests.jsonl", folder / "batch" / "records.jsonl", folder / "expected.jsonl"
        )
        made.output.parent.mkdir()
        requests = (
            {"prompt": f"{TEXT * (n % 2)}{n}", "temperature": 0, "max_tokens": n % 10 + 1}
            for n in range(count)
        )
        made.source.write_text("".join(f"{json.dumps(request)}\n" for request in requests))
        return made

    def restart(self) -> None:
        """Remove the output if it holds all records."""
        if self.output.exists() and self.output.read_bytes() == self.expected.read_bytes():
            self.output.unlink()

    def fault(self, *, complete: bool = False) -> str | None:
        """Return the first difference between the output and the first, or all, of the expected records."""
        found = self.output.read_bytes() if self.output.exists() else b""
        expected = self.expected.read_bytes()
        if expected[: None if complete else len(found)] == found:
            return None
        pairs = enumerate(zip_longest(found.splitlines(), expected.splitlines()), 1)
        return next(f"record {n} is {record!r:.300}" for n, (record, right) in pairs if record != right)
