"""The time of commands that read a manifest is linear in the manifest's length, not quadratic.

Instead of measuring time, the tests count calls and attribute reads of records, for lists of one length and for lists
that are four times as long.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.frozen import Frozen
from precast.loaders.artifact.machine import Machine
from precast.loaders.artifact.manifest import Manifest
from precast.loaders.artifact.manifest_parser import parse_manifest
from precast.loaders.audit import check, diff, inspect
from precast.loaders.compiling import trial
from precast.loaders.console import check as check_console
from precast.loaders.console import diff as diff_console
from precast.loaders.console import inspect as inspect_console
from precast.loaders.runtime.resources import Limits, Memory, Processors

MACHINE = Machine(machine="x86_64", features=("avx",), jaxlib="1", kernel_abi=3, kernels=())
ENTRY = {"bytes": 1, "sha256": "0" * 64}
ROOT = Path("artifact")


@pytest.fixture(scope="module")
def template(tiny_artifact: Path) -> Mapping[str, Any]:
    """Return the tiny artifact's manifest with one bucket of one token and no cache, so that lists can be long."""
    value = json.loads((tiny_artifact / "manifest.json").read_text())
    target = value["targets"][0]
    one = [p for p in target["programs"] if p["name"] not in ("prefill_16", "score")]
    for program in one:
        for key in ("arguments", "results"):
            program[key] = [v for v in program[key] if v["role"] not in ("cache", "weight", "table")]
    target["programs"] = one
    value["model"]["layers"] = 0
    return {**value, "targets": [target], "cache": [], "buckets": [8]}


def fresh(template: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(template))


def many_targets(m: Any, n: int) -> None:
    m["targets"] = [{**m["targets"][0], "name": f"target{i}"} for i in range(n)]


def many_programs(m: Any, n: int) -> None:
    """Make one prefill program for each bucket, each in a separate folder."""
    target, m["capacity"], m["buckets"] = m["targets"][0], n + 8, list(range(1, n + 1))
    (old,) = [p for p in target["programs"] if p["kind"] == "prefill"]
    others = [p for p in target["programs"] if p["kind"] != "prefill"]
    prefills = []
    for i in m["buckets"]:
        first, *rest = old["arguments"]
        executable = f"programs/{i}/x.xla"
        arguments = [{**first, "shape": [i]}, *rest]
        changes = {"name": f"p{i}", "tokens": i, "executable": executable, "arguments": arguments}
        prefills.append({**old, **changes})
        m["files"][executable] = ENTRY
    target["programs"] = [*others, *prefills]


def many_caches(m: Any, n: int) -> None:
    capacity = m["capacity"]
    for i in range(n):
        array = {"name": f"a.kind{i}", "shape": [0, m["slots"], capacity], "axes": "LBS", "dtype": "int8"}
        m["cache"].append({**array, "layout": [0, 1, 2], "window": 0, "layers": [], "bytes": 0})
    values = [
        {"name": a["name"], "role": "cache", "shape": a["shape"], "dtype": "int8", "layout": a["layout"]}
        for a in m["cache"]
    ]
    for program in m["targets"][0]["programs"]:
        held = [{**v, "alias": None} for v in values]
        program["results"] += held
        program["arguments"] += held if program["kind"] != "cache" else []


def many_files(m: Any, n: int) -> None:
    m["files"] |= {f"programs/cpu/file{i}": ENTRY for i in range(n)}


def in_target(key: str) -> Callable[[Any, int], None]:
    return lambda m, n: m["targets"][0].update({key: [f"name{i}" for i in range(n)]})


LISTS: Mapping[str, Callable[[Any, int], None]] = {
    "targets": many_targets,
    "programs": many_programs,
    "cache arrays": many_caches,
    "files": many_files,
    "CPU features": in_target("cpu_features"),
    "kernels": in_target("kernels"),
    "end tokens": lambda m, n: m["tokenizer"].update(eos_token_ids=list(range(n))),
    "source files": lambda m, n: m["provenance"].update(source_files={f"f{i}": ENTRY for i in range(n)}),
    "versions": lambda m, n: m["provenance"].update(versions={f"package{i}": "1" for i in range(n)}),
}


def checked(m: Manifest, _: Manifest) -> None:
    cores, memory = Processors(cores=1, usable=1, quota=None), Memory(limit=None, available=None)
    report = check.check(
        ROOT, m, MACHINE, cores, memory, Limits(address_space=None, threads=None), date(2026, 1, 1)
    )
    list(check_console.lines(report))
    check_console.to_json(report)


def compared(m: Manifest, other: Manifest) -> None:
    list(diff_console.lines(ROOT, ROOT, diff.diff(ROOT, m, ROOT, other)))


COMMANDS: Mapping[str, Callable[[Manifest, Manifest], object]] = {
    "check": checked,
    "inspect": lambda m, _: list(inspect_console.lines(ROOT, inspect.describe(m))),
    "diff": compared,
    "the name of a trial": lambda m, _: trial._record(m, m.targets[0], MACHINE),
}


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count calls, and reads of the records' attributes."""
    count, plain = [0], object.__getattribute__

    def read(self: object, name: str) -> Any:
        count[0] += 1
        return plain(self, name)

    def called(_: object, event: str, __: object) -> None:
        count[0] += event in ("call", "c_call")

    with monkeypatch.context() as patch:
        patch.setattr(Frozen, "__getattribute__", read)
        sys.setprofile(called)
        try:
            yield count
        finally:
            sys.setprofile(None)


@pytest.mark.parametrize("name", LISTS)
def test_work_grows_linearly_with_the_length_of_a_list(template, monkeypatch, name, tmp_path):
    monkeypatch.setenv("PRECAST_CACHE", str(tmp_path))
    work: dict[str, list[int]] = {command: [] for command in ("parsing", *COMMANDS)}
    for length in (100, 400):
        value = fresh(template)
        LISTS[name](value, length)
        text = json.dumps(value).encode()
        other = re.sub(rb'"name(\d)', rb'"other\1', text)  # all items differ
        with counting(monkeypatch) as count:
            manifest = parse_manifest(text, "m.json")
        work["parsing"].append(count[0])
        changed = parse_manifest(other, "m.json")
        for command, act in COMMANDS.items():
            with counting(monkeypatch) as count:
                act(manifest, changed)
            work[command].append(count[0])
    assert {c: few for c, (few, many) in work.items() if many > 5 * few} == {}


class CountedText(str):
    """A string that counts its comparisons."""

    comparisons = 0

    def __eq__(self, other: object) -> bool:
        CountedText.comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__

    def startswith(self, *arguments: Any) -> bool:
        CountedText.comparisons += len(arguments[0]) if isinstance(arguments[0], tuple) else 1
        return str.startswith(self, *arguments)


@pytest.mark.parametrize(
    "act",
    [
        lambda names: diff_console._lists(names, [CountedText(f"{n}+") for n in names]),
        lambda names: list(trial._below({f"{n}/" for n in names}, [CountedText(f"{n}/x") for n in names])),
    ],
    ids=["lists that differ", "files of programs"],
)
def test_long_lists_are_not_compared_pairwise(act):
    names: Sequence[CountedText] = [CountedText(f"name{i}") for i in range(1000)]
    CountedText.comparisons = 0
    act(names)
    assert CountedText.comparisons <= 3000


def test_files_below_folders_are_found_as_by_pairwise_comparison():
    folders = {"a/", "a/b/", "a-/", "b/c/", "é/"}
    names = ["a", "a/", "a/x", "a/b", "a/b/x", "a-", "a-/x", "a.", "b/x", "b/c", "b/c/d", "b/cc", "é/x", ""]
    assert list(trial._below(folders, names)) == [n for n in names if n.startswith(tuple(folders))]


def test_the_error_for_another_cache_is_short(template):
    value = fresh(template)
    many_caches(value, 500)
    value["targets"][0]["programs"][0]["results"].pop()
    with pytest.raises(PrecastError, match="its KV cache differs from the artifact's") as raised:
        parse_manifest(json.dumps(value).encode(), "m.json")
    assert len(str(raised.value)) < 700
