"""The trial of the first load in a child process: a crash becomes an error text, a success is recorded."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.compiling import child_process, trial
from precast.loaders.compiling import compiler as compiling
from precast.loaders.load import load
from precast.loaders.locate import read_manifest
from precast.loaders.runtime.installed import this_machine

PROMPT = [7, 200, 31]


@pytest.fixture
def children(monkeypatch):
    """Record the command lines of the child processes that trials start."""
    seen, original = [], subprocess.Popen

    def start(command, **rest):
        if "precast.loaders.trial_worker" in command:
            seen.append(command)
        return original(command, **rest)

    monkeypatch.setattr(subprocess, "Popen", start)
    return seen


def records(cache):
    return sorted((cache / "tried").iterdir()) if (cache / "tried").exists() else []


def ensure(root, log=print, **changes):
    manifest = read_manifest(root)
    trial.ensure(root, manifest, manifest.targets[0], this_machine(), allow_compile=False, threads=1, log=log)


def test_an_artifact_is_tried_once(tiny_artifact, own_cache, children):
    said = []
    load(tiny_artifact, log=said.append)
    assert len(children) == 1
    assert len(records(own_cache)) == 1
    load(tiny_artifact, log=said.append)
    assert len(children) == 1
    assert said == []


@pytest.mark.parametrize("threads", [1, None])
def test_a_trial_computes_with_as_many_threads_as_the_load(
    tiny_artifact, own_cache, children, monkeypatch, threads
):
    """A limit on threads or on address space may not allow more."""
    asked, original = [], child_process.Child.ask

    def ask(self, request, *rest, **options):
        asked.append(request)
        return original(self, request, *rest, **options)

    monkeypatch.setattr(child_process.Child, "ask", ask)
    load(tiny_artifact, threads=threads)
    ((*_, module),) = children
    (request,) = asked
    assert (module, request["root"]) == ("precast.loaders.trial_worker", str(tiny_artifact))
    assert request["threads"] == threads


def test_an_export_has_tried_its_artifact(tiny_artifact, children):
    """The export recorded the trial in the cache folder of the tests."""
    load(tiny_artifact)
    assert children == []


def test_a_copy_is_the_same_artifact_and_an_altered_one_is_not(
    tiny_artifact, artifact_copy, edit_manifest, own_cache, children
):
    load(tiny_artifact)
    edit_manifest(artifact_copy, lambda m: m.update(name="another name"))
    load(artifact_copy)
    assert len(children) == 1
    edit_manifest(artifact_copy, lambda m: m["targets"][0]["programs"][0].update(flops=1))
    load(artifact_copy)
    assert len(children) == len(records(own_cache)) == 2


def test_a_trusted_artifact_is_not_tried(tiny_artifact, own_cache, children):
    load(tiny_artifact, trusted=True)
    assert (children, records(own_cache)) == ([], [])


def test_the_record_depends_on_all_that_decides_if_a_target_runs(tiny_artifact):
    manifest, machine = read_manifest(tiny_artifact), this_machine()
    target, other = manifest.targets
    entry = dataclasses.replace(manifest.files["weights.safetensors"], sha256="0" * 64)
    program = target.programs[0].executable
    records = [
        trial._record(manifest, target, machine),
        trial._record(manifest, other, machine),
        trial._record(manifest, target, dataclasses.replace(machine, jaxlib="9")),
        trial._record(manifest, target, dataclasses.replace(machine, features=())),
        trial._record(manifest, target, dataclasses.replace(machine, kernel_abi=9)),
        trial._record(dataclasses.replace(manifest, capacity=8), target, machine),
        trial._record(
            dataclasses.replace(manifest, files={**manifest.files, "weights.safetensors": entry}),
            target,
            machine,
        ),
        trial._record(
            dataclasses.replace(manifest, files={**manifest.files, program: entry}), target, machine
        ),
    ]
    assert len(set(records)) == len(records)
    same = dataclasses.replace(manifest, name="x", files={**manifest.files, "README.md": entry})
    assert trial._record(same, target, machine) == records[0]


def test_without_a_writable_cache_every_load_tries_and_logs_it(
    tiny_artifact, tmp_path, monkeypatch, children
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRECAST_CACHE", str(tmp_path / "file" / "below"))
    for count in (1, 2):
        said = []
        assert load(tiny_artifact, log=said.append).generate(PROMPT).token_ids
        assert len(children) == count
        (line,) = (line for line in said if "in a child process" in line)
        assert "and will be tried at every start" in line
        assert "cannot be written to; set PRECAST_CACHE to a writable folder." in line


def test_without_a_home_folder_every_load_tries_and_logs_it(tiny_artifact, homeless, children):
    for count in (1, 2):
        said = []
        assert load(tiny_artifact, log=said.append).generate(PROMPT).token_ids
        assert len(children) == count
        (line,) = (line for line in said if "in a child process" in line)
        assert line.endswith(
            "start, because this user has no home folder to hold the cache folder; set PRECAST_CACHE to a folder."
        )


def test_the_time_limit_is_a_day_at_most(tiny_artifact):
    manifest = read_manifest(tiny_artifact)
    assert trial._limit_s(manifest, False) == 120
    assert trial._limit_s(manifest, True) == 1020
    for size in (2**50, 2**63):
        entry = dataclasses.replace(manifest.files["weights.safetensors"], bytes=size)
        files = {**manifest.files, "weights.safetensors": entry}
        assert trial._limit_s(dataclasses.replace(manifest, files=files), True) == 24 * 3600


def test_a_cpu_target_does_not_depend_on_gpus(tiny_artifact):
    manifest, machine = read_manifest(tiny_artifact), this_machine(cuda=False)
    other = dataclasses.replace(machine, gpus=("H100",), cuda_plugin="0.1")
    for target in manifest.targets:
        record = trial._record(manifest, target, machine)
        assert trial._record(manifest, target, other) == record
        on_gpu = dataclasses.replace(target, platform="cuda")
        assert trial._record(manifest, on_gpu, other) != trial._record(manifest, on_gpu, machine)


def test_programs_beside_the_manifest_count_and_other_files_there_do_not(tiny_artifact):
    manifest, machine = read_manifest(tiny_artifact), this_machine(cuda=False)
    target = manifest.targets[0]
    programs = tuple(dataclasses.replace(p, executable=f"{p.name}.xla") for p in target.programs)
    target = dataclasses.replace(target, programs=programs)
    entry = manifest.files["weights.safetensors"]
    files = {**manifest.files, **{p.executable: entry for p in programs}}
    records = [
        trial._record(dataclasses.replace(manifest, files={**files, **changed}), target, machine)
        for changed in (
            {},
            {programs[0].executable: dataclasses.replace(entry, sha256="0" * 64)},
            {"README.md": entry},
        )
    ]
    assert records[0] == records[2] != records[1]


def test_without_a_child_process_the_load_logs_it_and_goes_on(tiny_artifact, own_cache, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    said = []
    assert load(tiny_artifact, log=said.append).generate(PROMPT).token_ids
    (line,) = said
    assert (
        f"{tiny_artifact}: was not tried in a child process first, because no child can be started (" in line
    )
    assert "/no/such/python" in line
    assert records(own_cache) == []


# --- how children are started -------------------------------------------------------------------------------


def test_a_child_imports_from_where_this_process_does_and_not_from_its_folder(monkeypatch):
    monkeypatch.setattr(sys, "path", ["/one", "", b"/bytes", None, "/two"])
    monkeypatch.setenv("PYTHONPATH", "/three")
    monkeypatch.setenv("OTHER", "kept")
    monkeypatch.setenv(child_process.GUARD, "x")
    environment = child_process.environment("a.b")
    assert environment[child_process.GUARD] == "x,a.b"
    assert environment["PYTHONPATH"] == f"/one{os.pathsep}/two"
    assert environment["OTHER"] == "kept"
    assert child_process.command("a.b") == [sys.executable, "-P", "-m", "a.b"]


def test_odd_entries_of_the_path_do_no_harm(tiny_artifact, own_cache, monkeypatch, children):
    monkeypatch.setattr(sys, "path", ["", *sys.path, b"/bytes", 3])
    ensure(tiny_artifact)
    assert len(children) == len(records(own_cache)) == 1
    program = read_manifest(tiny_artifact).targets[0].programs[0]
    code = (tiny_artifact / program.stablehlo).read_bytes()
    said = []
    assert compiling.compile_programs([("one\x1b[2J", code)], "x", log=said.append)
    assert said == ["compiling one\N{REPLACEMENT CHARACTER}[2J from StableHLO …"]


@pytest.mark.parametrize("how", ["frozen", "no interpreter", "a path that no system takes"])
def test_without_a_python_nothing_is_started(tiny_artifact, own_cache, monkeypatch, children, how):
    if how == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    elif how == "no interpreter":
        monkeypatch.setattr(sys, "executable", None)
        for prefix in ("prefix", "base_prefix"):
            monkeypatch.setattr(sys, prefix, "/no/such/folder")
    else:
        monkeypatch.setattr(sys, "path", [*sys.path, "/a\0b"])
    said = []
    ensure(tiny_artifact, log=said.append)
    (line,) = said
    assert line.startswith(f"{tiny_artifact}: was not tried in a child process first, because")
    with pytest.raises(PrecastError, match=r"^x: the compiler's child process cannot be started \("):
        compiling.compile_programs([("decode", b"code")], "x", log=said.append)
    assert len(children) == (how == "a path that no system takes")


def child_that(monkeypatch, tmp_path, code, ready=True):
    """Make a Python that reports ready, then runs this code instead of its task."""
    script = tmp_path / "python"
    first = child_process.READY.decode() if ready else ""
    script.write_text(
        f"#!{sys.executable}\nimport json, os, signal, sys, time\nprint({first!r}, end='', flush=True)\n"
        f"def say(**message): print(json.dumps(message | {{'data': 0}}), flush=True)\n{code}\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("sys.exit('getopt_long() error')", "getopt_long() error"),
        ("sys.exit(3)", "exit code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("print('error: a sentence'); sys.exit(3)", "does not behave like a Python interpreter"),
        ("print('precast child'); time.sleep(600)", "does not behave like a Python interpreter"),
        ("time.sleep(600)", "did not become ready within 1 s"),
    ],
)
def test_a_child_other_than_python_is_named(tiny_artifact, tmp_path, own_cache, monkeypatch, code, reason):
    monkeypatch.setattr(child_process, "START_S", 1 if "within" in reason else 60)
    child_that(monkeypatch, tmp_path, code, ready=False)
    said = []
    ensure(tiny_artifact, log=said.append)
    (line,) = said
    assert line.startswith(
        f"{tiny_artifact}: was not tried in a child process first, because no child can be started ({tmp_path}/python"
    )
    assert line.endswith(f"{reason}).")
    assert records(own_cache) == []
    with pytest.raises(
        PrecastError, match=r"^x: the compiler's child process cannot be started \(.*/python"
    ) as raised:
        compiling.compile_programs([("decode", b"code")], "x", log=said.append)
    assert str(raised.value).endswith(
        f"{reason}); compile with precast add-target in a shell, or on another machine."
    )


@pytest.mark.parametrize("name", ["uwsgi", "uwsgi_python3", "app", ""])
def test_in_a_server_that_embeds_python_the_interpreter_beside_it_is_started(
    tiny_artifact, own_cache, monkeypatch, children, name
):
    monkeypatch.setattr(sys, "executable", name and f"/usr/bin/{name}")
    ensure(tiny_artifact, log=pytest.fail)
    ((python, *_),) = children
    assert python == f"{sys.prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    assert len(records(own_cache)) == 1


def test_an_application_that_starts_itself_does_so_once(tiny_artifact, tmp_path, own_cache):
    app, log = tmp_path / "python-app", tmp_path / "log"
    app.write_text(
        f"#!{sys.executable}\nimport sys\nsys.executable = {str(app)!r}\nopen({str(log)!r}, 'a').write('start\\n')\n"
        f"import precast\nprecast.load({str(tiny_artifact)!r}, log=lambda s: print(s, file=open({str(log)!r}, 'a')))\n"
    )
    app.chmod(0o755)
    result = subprocess.run([app], capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    first, second, inner, outer = log.read_text().splitlines()
    assert first == second == "start"
    start = f"{tiny_artifact}: was not tried in a child process first, because no child can be started ("
    assert inner == f"{start}this process is itself a child process for precast.loaders.trial_worker)."
    assert outer == f"{start}{app}: exit code 0)."
    assert records(own_cache) == []


def test_a_child_that_tries_may_start_one_that_compiles(monkeypatch):
    monkeypatch.setenv(child_process.GUARD, "precast.loaders.trial_worker")
    assert child_process.command("precast.loaders.compiling.compiler")[0] == sys.executable
    with pytest.raises(
        child_process.StartError, match=r"itself a child process for precast\.loaders\.trial_worker"
    ):
        child_process.command("precast.loaders.trial_worker")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (
            "say(progress='loading decode'); os.kill(os.getpid(), signal.SIGSEGV)",
            "which crashed while loading decode (SIGSEGV); its programs do not suit this machine: compile them here",
        ),
        (
            "say(progress='running prefill_8'); os.kill(os.getpid(), signal.SIGABRT)",
            "which crashed while running prefill_8 (SIGABRT); its programs",
        ),
        ("os.kill(os.getpid(), signal.SIGBUS)", "which crashed while starting (SIGBUS); its programs"),
        (
            "os.kill(os.getpid(), signal.SIGRTMIN + 3)",
            "which crashed while starting (signal 37); its programs",
        ),
        (
            "say(progress='loading decode'); os.kill(os.getpid(), signal.SIGKILL)",
            "which was killed while loading decode, probably because memory ran out; run precast check",
        ),
        ("sys.exit('ImportError: gone')", "which failed while starting (ImportError: gone); its programs"),
        ("sys.exit(5)", "which failed while starting (exit code 5); its programs"),
        ("say(error='one sentence.'); sys.exit(3)", "one sentence."),
        (
            "print('[1]', flush=True); time.sleep(60)",
            "which failed while starting (unexpected output: b'[1]'); its",
        ),
        ("sys.exit(3)", "which failed while starting (exit code 3); its programs"),
        ("signal.alarm(1); time.sleep(60)", "which had not finished starting after"),
    ],
)
def test_every_end_of_the_child_has_its_error_text(
    tiny_artifact, tmp_path, own_cache, monkeypatch, code, text
):
    child_that(monkeypatch, tmp_path, code)
    with pytest.raises(PrecastError) as raised:
        ensure(tiny_artifact)
    assert text in str(raised.value)
    assert text == str(raised.value) or str(raised.value).startswith(f"{tiny_artifact}: target 'cpu-")
    assert records(own_cache) == []


def test_a_child_that_hangs_is_ended(tiny_artifact, tmp_path, own_cache, monkeypatch):
    child_that(monkeypatch, tmp_path, "say(progress='loading decode'); time.sleep(600)")
    # On a busy machine, it may take seconds until a child reports its progress.
    for limit_s in (1, 5, 60):
        monkeypatch.setattr(trial, "_limit_s", lambda *_, limit_s=limit_s: limit_s)
        with pytest.raises(PrecastError) as raised:
            ensure(tiny_artifact)
        if "finished starting after" not in str(raised.value):
            break
    text = f"which had not finished loading decode after {limit_s} s; its programs do not"
    assert text in str(raised.value)
    assert records(own_cache) == []


def answer_of_worker(python, root):
    """Run the trial's child process directly; return its result and its messages."""
    target = read_manifest(root).targets[0].name
    request = {"root": str(root), "target": target, "allow_compile": False, "threads": 1}
    message = {"request": request, "limit_s": 600, "data": 0}
    result = python("-m", "precast.loaders.trial_worker", stdin=f"{json.dumps(message)}\n")
    assert result.returncode == 0, result.stderr
    ready, *messages = result.stdout.splitlines()
    assert ready == "precast child ready"
    return [json.loads(line) for line in messages]


def test_the_child_reports_its_steps(tiny_artifact, python):
    programs = ("cache", "prefill_8", "prefill_16", "decode", "score")
    running = ("cache", "prefill_8", "decode", "score")
    assert answer_of_worker(python, tiny_artifact) == [
        *({"progress": f"loading {name}", "data": 0} for name in programs),
        *({"progress": f"running {name}", "data": 0} for name in running),
        {"answer": {}, "data": 0},
    ]


def test_the_child_passes_a_refusal_on(artifact_copy, python):
    (artifact_copy / "tokenizer.json").unlink()
    text = f"{artifact_copy}: file 'tokenizer.json' is missing; copy or export the artifact again."
    assert answer_of_worker(python, artifact_copy) == [{"error": text, "data": 0}]


def test_a_child_ends_after_its_time_even_without_a_parent(python):
    code = (
        "import time; from precast.loaders.compiling import child_process\n"
        "child_process._limit_time(-4)\n"  # and five seconds more
        "time.sleep(60)"
    )
    assert python("-c", code).returncode == -signal.SIGALRM


def test_a_child_without_a_limit_goes_on(python):
    code = (
        "import time; from precast.loaders.compiling import child_process\n"
        "child_process._limit_time(-4)\n"
        "child_process._limit_time(None)\n"
        "time.sleep(2)"
    )
    assert python("-c", code).returncode == 0


@pytest.mark.parametrize(
    "options", [{"context": 2, "buckets": (1,)}, {"slots": 3, "context": 16, "buckets": (8,)}]
)
def test_small_contexts_and_several_slots(export_tiny, options, own_cache, children):
    root = export_tiny(targets=("cpu",), **options)
    for record in records(own_cache):
        record.unlink()
    load(root)
    assert len(children) == len(records(own_cache)) == 1
