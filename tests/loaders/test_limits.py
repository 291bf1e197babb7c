"""System limits cause an error message before XLA reaches them, and the number of threads is right."""

import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.model import Model
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load
from precast.loaders.locate import read_manifest
from precast.loaders.runtime import limits, pjrt, resources
from precast.loaders.runtime.resources import Processors

PROMPT = [7, 200, 31]
FREE = SamplingParams(ignore_eos=True)


def few_threads(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Simulate a system that lets this process start only `most` further threads."""
    monkeypatch.setattr(resources, "_thread_limit", lambda system: 1000)
    start, started = resources.start_new_thread, Counter[object]()

    def limited(function: Callable[..., None], arguments: tuple[Any, ...]) -> int:
        gate = arguments[0]  # all threads of a trial wait for the same event
        if started[gate] >= most:
            raise RuntimeError("can't start new thread")
        started[gate] += 1
        return start(function, arguments)

    monkeypatch.setattr(resources, "start_new_thread", limited)


def test_a_thread_that_never_runs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """If there is no memory for a thread's first step, the thread starts, but never runs."""
    monkeypatch.setattr(resources, "_thread_limit", lambda system: 0)
    monkeypatch.setattr(resources, "start_new_thread", lambda *_: 1)
    assert resources.limits(3).threads == 0


@pytest.mark.parametrize("most", [0, 1, 19])
def test_too_few_threads_have_an_error_text(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    before = threading.active_count()
    few_threads(monkeypatch, most)
    with pytest.raises(PrecastError) as raised:
        load(tiny_artifact, threads=5)
    assert str(raised.value) == (
        f"{tiny_artifact}: XLA starts 21 threads, but this process may start only {most} more (ulimit -u, pids.max"
        f" of the"
        " container); raise that limit, or compute with fewer threads (--threads 1)."
    )
    assert threading.active_count() == before


def test_an_existing_client_needs_no_threads(
    tiny_artifact: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(tiny_artifact)
    few_threads(monkeypatch, 1)  # the one thread loads the programs
    assert load(tiny_artifact).generate(PROMPT, FREE).token_ids == first.generate(PROMPT, FREE).token_ids


def test_enough_threads_are_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    few_threads(monkeypatch, 7)
    assert [resources.limits(n).threads for n in (7, 8)] == [None, 7]


def test_groups_that_limit_threads_are_seen(tmp_path: Path) -> None:
    """The control group with the fewest remaining threads counts, in version 1 and in version 2."""
    for name, text in {
        "proc/self/cgroup": "8:pids:/a\n0::/a/b\n",
        "sys/fs/cgroup/pids/a/pids.max": "100\n",
        "sys/fs/cgroup/pids/a/pids.current": "30\n",
        "sys/fs/cgroup/pids/pids.max": "max\n",
        "sys/fs/cgroup/a/b/pids.max": "max\n",
        "sys/fs/cgroup/a/pids.max": "90\n",
        "sys/fs/cgroup/a/pids.current": "40\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert resources._thread_limit(tmp_path) == 50
    assert resources.limits(10, tmp_path).threads is None
    assert resources._thread_limit(tmp_path / "nothing") > 1000


@pytest.mark.parametrize("kind", ["RLIMIT_NPROC", "RLIMIT_AS"])
def test_limits_of_a_process_are_seen(python: Any, kind: str) -> None:
    code = (
        "import resource; from pathlib import Path; from precast.loaders.runtime import resources\n"
        f"resource.setrlimit(resource.{kind}, (1 << 40, 1 << 40) if {kind!r} == 'RLIMIT_AS' else (77, 77))\n"
        "print(resources._thread_limit(Path('/nothing')))"
    )
    assert python("-c", code).stdout == ("0\n" if kind == "RLIMIT_AS" else "77\n")


UNDER_A_LIMIT = """
import resource, sys
import precast
import precast.loaders.load
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]),) * 2)
try:
    model = precast.load(sys.argv[1], threads=2)
    print("loaded", len(model.generate([7, 200, 31], precast.SamplingParams(max_tokens=4, ignore_eos=True)).token_ids))
except precast.PrecastError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("beyond", "text"), [(-700 << 20, "refused"), (-1 << 20, "refused"), (8 << 20, "loaded")]
)
def test_address_space_is_refused_or_enough(tiny_artifact: Path, python: Any, beyond: int, text: str) -> None:
    """Test limits near the bound in `load`, in a process for which the trial is already recorded."""
    manifest = read_manifest(tiny_artifact)
    needed = limits.need(manifest, manifest.targets[0])
    space = needed.all + needed.idle + limits._FIXED + 2 * limits._PER_THREAD
    result = python("-c", UNDER_A_LIMIT, str(tiny_artifact), str(space + beyond))
    assert (result.returncode, result.stderr) == (0, "")
    if text == "loaded":
        assert result.stdout == "loaded 4\n"
    else:
        assert result.stdout.startswith(f"{tiny_artifact}: it needs 9")
        assert result.stdout.endswith(
            "(ulimit -v); raise that limit, or compute with fewer threads (--threads 1).\n"
        )


SECOND_UNDER_A_LIMIT = """
import resource, sys
import precast
def answer(path):
    model = precast.load(path, threads=2, trusted=True)
    return len(model.generate([7, 200, 31], precast.SamplingParams(max_tokens=4, ignore_eos=True)).token_ids)
answer(sys.argv[1])
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]),) * 2)
try:
    print("loaded", answer(sys.argv[1]))
except precast.PrecastError as error:
    print(error)
"""


@pytest.mark.parametrize(("beyond", "text"), [(-2 << 20, "refused"), (2 << 20, "loaded")])
def test_the_memory_of_a_second_model_counts(
    tiny_artifact: Path, python: Any, beyond: int, text: str
) -> None:
    """The threads of the second model do not count, because the first model started them."""
    manifest = read_manifest(tiny_artifact)
    needed = limits.need(manifest, manifest.targets[0])
    space = needed.all + needed.idle + limits._FURTHER
    result = python("-c", SECOND_UNDER_A_LIMIT, str(tiny_artifact), str(space + beyond))
    assert (result.returncode, result.stderr) == (0, "")
    if text == "loaded":
        assert result.stdout == "loaded 4\n"
    else:
        assert re.fullmatch(
            rf"{tiny_artifact}: it needs \d+\.\d MB of address space, but this process may take only \d+\.\d MB more"
            r" \(ulimit -v\); raise that limit\.\n",
            result.stdout,
        )


def test_idle_slots_need_address_space_and_no_memory(tiny_artifact: Path) -> None:
    """Programs without kernels fill the whole cache with zeros, so their idle slots need memory."""
    manifest = read_manifest(tiny_artifact)
    cpu, portable = (limits.need(manifest, target) for target in manifest.targets)
    assert manifest.slots == 8
    cache = sum(array.bytes for array in manifest.cache)
    assert (cpu.cache * 8, cpu.idle) == (cache, cache - cpu.cache)
    assert (portable.cache, portable.idle) == (cache, 0)


def test_address_space_that_fewer_slots_would_fit_has_that_remedy(tiny_artifact: Path) -> None:
    manifest = read_manifest(tiny_artifact)
    needed = limits.need(manifest, manifest.targets[0])
    space = needed.all + needed.idle + limits._FURTHER
    for less, remedy in (
        (0, None),
        (1, "fewer --slots"),
        (needed.idle, "fewer --slots"),
        (space, "that limit"),
    ):
        left = resources.Limits(address_space=space - less, threads=None)
        found = [advice for _, advice in limits.problems(needed, 2, left, has_client=True)]
        assert [advice.endswith(str(remedy)) for advice in found] == [True] * (remedy is not None)


def test_a_cache_that_the_system_does_not_allocate_has_an_error_text(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "_allocation", lambda system: 10_000)
    with pytest.raises(PrecastError) as raised:
        load(tiny_artifact)
    assert str(raised.value) == (
        f"{tiny_artifact}: an array of its KV cache takes 147.5 kB of address space, but this system allocates at most"
        " 10.0 kB at once; set vm.overcommit_memory to 1, or export with fewer --slots or a shorter --context."
    )


@pytest.mark.parametrize(("mode", "most"), [("0", 30 << 10), ("1", None), ("2", 5 << 10), ("", None)])
def test_the_largest_allocation_follows_linux(tmp_path: Path, mode: str, most: int | None) -> None:
    (tmp_path / "proc/sys/vm").mkdir(parents=True)
    (tmp_path / "proc/sys/vm/overcommit_memory").write_text(f"{mode}\n")
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal: 20 kB\nSwapTotal: 10 kB\nCommitLimit: 9 kB\nCommitted_AS: 4 kB\n"
    )
    assert resources._allocation(tmp_path) == most


def test_libraries_that_do_not_fit_have_an_error_text(tiny_artifact: Path) -> None:
    command = 'ulimit -v 300000; exec "$0" -m precast.cli run "$1" -p x'
    result = subprocess.run(
        ["sh", "-c", command, sys.executable, str(tiny_artifact)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: jaxlib cannot be imported (")
    assert result.stderr.count("\n") == 1


# --- how many threads compute -------------------------------------------------------------------------------


def pool_threads() -> int:
    """Return the threads of XLA's pools in this process."""
    count = 0
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has ended
            count += (task / "comm").read_text().startswith("tf_XLAEigen")
    return count


def test_a_model_computes_with_as_many_threads_as_asked(tiny_artifact: Path, tiny_model: Model) -> None:
    answer = tiny_model.generate(PROMPT, FREE).token_ids
    before = pool_threads()
    model = load(tiny_artifact, threads=7)
    assert pool_threads() - before == 7
    again = load(tiny_artifact, threads=7)
    assert pool_threads() - before == 7
    # The promise: answers do not depend on the number of threads.
    assert model.generate(PROMPT, FREE).token_ids == again.generate(PROMPT, FREE).token_ids == answer


@pytest.mark.parametrize(("quota", "expected"), [(None, 6), (0.5, 1), (1.0, 1), (4.9, 4), (64.0, 6)])
def test_threads_follow_the_quota_by_default(
    tiny_artifact: Path, monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int
) -> None:
    asked = []
    monkeypatch.setattr(resources, "processors", lambda: Processors(cores=8, usable=6, quota=quota))
    client = pjrt.client
    monkeypatch.setattr(pjrt, "client", lambda threads: asked.append(threads) or client())
    load(tiny_artifact)
    load(tiny_artifact, threads=9)
    assert asked == [expected, 9]


@pytest.mark.parametrize("threads", [0, -1, 1025, True, 1.5, "2"])
def test_invalid_numbers_of_threads_are_refused(tiny_artifact: Path, threads: Any) -> None:
    with pytest.raises(PrecastError) as raised:
        load(tiny_artifact, threads=threads)
    assert str(raised.value) == f"threads: expected a whole number from 1 to 1024, found {threads!r}."


@pytest.mark.parametrize("command", ["run", "verify", "eval", "chat"])
def test_commands_take_threads(cli: Any, tiny_artifact: Path, command: str) -> None:
    prompt = ("-p", "x") if command == "run" else ()
    result = cli(command, tiny_artifact, *prompt, "--threads", "0")
    assert result.exit_code == 2
    assert "error: threads: expected a whole number from 1 to 1024, found 0.\n" in result.stderr
