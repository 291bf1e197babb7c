"""The process of a command: imports, streams, help, and garbage collection."""

import gc
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

PROMPT = "7,200,31"


def test_run_never_imports_jax_although_it_is_installed(tiny_artifact, python):
    code = (
        "import importlib.util, sys\n"
        "assert importlib.util.find_spec('jax')\n"
        "from precast.cli import main\n"
        "main(['run', sys.argv[1], '--ids', '7,200,31'], standalone_mode=False)\n"
        "loaded = [m for m in sys.modules if m.partition('.')[0] in ('jax', 'flax', 'transformers', 'rich')]\n"
        "print([m for m in loaded if sys.modules[m] is not None])"
    )
    result = python("-c", code, str(tiny_artifact))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_greedy_answers_import_no_random_generators(python, tiny_artifact):
    """The import of numpy.random takes 6 ms, and that of numpy.ctypeslib 1 ms."""
    code = (
        "import sys, precast\n"
        "model, params = precast.load(sys.argv[1]), precast.SamplingParams(temperature=0, max_tokens=2)\n"
        "print([model.generate([1, 2, 3], params).timing.cached_tokens for _ in range(2)])\n"
        "print(sorted({'numpy.ctypeslib', 'numpy.random'} & set(sys.modules)))\n"
        "model.generate([1, 2, 3], precast.SamplingParams(temperature=1, max_tokens=1))\n"
        "print('numpy.random' in sys.modules)"
    )
    result = python("-c", code, str(tiny_artifact))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[0, 2]", "[]", "True"]


def test_help_lists_commands_in_the_order_of_use(cli):
    lines = cli("--help").stdout.partition("Commands:\n")[2].splitlines()
    names, summaries = zip(*(line.split(maxsplit=1) for line in lines), strict=True)
    assert names[:6] == ("export", "run", "chat", "batch", "serve", "add-target")
    assert all(summary.endswith(".") and not summary.endswith("...") for summary in summaries)


def test_help_needs_no_library(python):
    code = (
        "import sys\n"
        "from precast.cli import main\n"
        "main(['run', '--help'], standalone_mode=False)\n"
        "print(sorted({'jax', 'jaxlib', 'numpy', 'tokenizers', 'rich'} & set(sys.modules)))"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["check", "inspect", "diff"])
def test_a_terminal_that_shows_less_than_is_printed(artifact_copy, python, command):
    """Characters that the encoding lacks, and file names that are not valid in any encoding."""
    odd = artifact_copy.rename(artifact_copy.with_name("odd-\udcff-→"))
    paths = [str(odd)] * (2 if command == "diff" else 1)
    result = python("cli.py", command, *paths, env={"PYTHONIOENCODING": "ascii:strict"})
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "odd-" in result.stdout


def test_untrusted_names_cannot_control_a_terminal(capsys, monkeypatch):
    from precast.loaders.artifact.errors import log_to_stderr
    from precast.loaders.console import chat_input
    from precast.loaders.console import conversation as chat_console

    log_to_stderr("name \x1b]0;gone\x07")
    manifest = SimpleNamespace(name="\x1b[2Jname", tokenizer=SimpleNamespace(chat_template="chat.jinja"))
    target, engine = SimpleNamespace(name="cpu\x9b2J"), SimpleNamespace(context=64)
    monkeypatch.setattr(chat_input, "messages", lambda: iter(()))
    monkeypatch.setenv("PRECAST_HISTORY", "off")
    model = SimpleNamespace(manifest=manifest, target=target, engine=engine)
    chat_console.converse(model, None, [], stats=False, literal=False)
    shown = capsys.readouterr()
    assert shown.err == "name �]0;gone�\n"
    assert shown.out.startswith("�[2Jname on cpu�2J, 64 positions.")


def test_an_interrupt_ends_a_command_with_a_message(python):
    code = (
        "from precast import cli\n"
        "from precast.loaders.console import inspect\n"
        "def interrupted(*_, **__): raise KeyboardInterrupt\n"
        "inspect.render = interrupted\n"
        "cli.main(['inspect', 'anywhere'])"
    )
    result = python("-c", code)
    assert (result.returncode, result.stderr.split()) == (130, ["interrupted"])


@pytest.mark.parametrize("command", [[], ["export"], ["run"], ["inspect"]])
def test_the_installed_command_is_the_one_in_the_checkout(python, command):
    installed = Path(sysconfig.get_path("scripts")) / "precast"
    if not installed.is_file():
        pytest.skip("precast is not installed here, only importable")
    ours = python("cli.py", *command, "--help")
    # The help shows the name of the script.
    theirs = python(str(installed), *command, "--help")
    assert ours.returncode == theirs.returncode == 0
    assert ours.stdout.replace("cli.py", "precast") == theirs.stdout


def test_the_version_is_the_package_s(cli):
    from importlib.metadata import PackageNotFoundError, version

    try:
        expected = version("precast")
    except PackageNotFoundError:
        pytest.skip("precast is not installed here, only importable")
    assert cli("--version").stdout == f"precast {expected}\n"


# --- what a start sets in the process -----------------------------------------------------------------------


@pytest.fixture
def collecting(monkeypatch):
    """Return a list to which each read of a manifest and each answer adds the event, and True if collection was on."""
    from precast.loaders import load
    from precast.loaders.generation.model import Model

    seen = []

    def watch(owner, name):
        whole = getattr(owner, name)

        def watched(*arguments, **options):
            seen.append((name, gc.isenabled()))
            return whole(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(load, "read_manifest")
    watch(Model, "stream")
    yield seen
    gc.enable()


REFUSED, RUNS = ("--target", "none"), ()


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("options", [RUNS, REFUSED])
def test_garbage_collection_resumes_after_the_load(cli, tiny_artifact, collecting, options, on):
    """A start creates no garbage, so collection is off until the artifact is loaded."""
    (gc.enable if on else gc.disable)()
    before = gc.get_freeze_count()
    result = cli("run", tiny_artifact, "-p", "a", "-n", "1", *options)
    assert result.exit_code == (2 if options == REFUSED else 0), result.output
    assert (gc.isenabled(), gc.get_freeze_count()) == (on, before)
    assert collecting == [("read_manifest", False), ("stream", on)][: 1 if options == REFUSED else 2]


def test_loaded_objects_are_in_the_oldest_generation(python):
    """Otherwise the first young collection, during generation, would visit all loaded objects."""
    code = (
        "import gc\n"
        "from pathlib import Path\n"
        "from precast.loaders.console.run import fast_start\n"
        "gc.disable()  # or a collection would run before the check\n"
        "with fast_start(Path('anywhere')):\n"
        "    made = [[] for _ in range(50_000)]\n"
        "young = len(gc.get_objects(generation=0))\n"
        "assert young < 5000, young"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


def test_objects_frozen_by_the_caller_stay_frozen(python):
    code = (
        "import gc\n"
        "from pathlib import Path\n"
        "from precast.loaders.console.run import fast_start\n"
        "gc.freeze()\n"
        "before = gc.get_freeze_count()\n"
        "with fast_start(Path('anywhere')): pass\n"
        "assert gc.get_freeze_count() >= before > 0"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


def test_garbage_collection_stays_on_during_a_pull(record, tiny_artifact, collecting, monkeypatch):
    from precast.loaders.store import pull as store_pull

    def fetch(url, **_):
        collecting.append((url, gc.isenabled()))
        return tiny_artifact

    monkeypatch.setattr(store_pull, "fetch", fetch)
    record("s3://bucket/tiny", "--ids", PROMPT, "-n", "1")
    assert collecting == [("s3://bucket/tiny", True), ("read_manifest", True), ("stream", True)]


@pytest.mark.parametrize("own", [None, "3"])
def test_numpy_starts_no_threads_unless_asked_to(tiny_artifact, python, own):
    """OpenBLAS reads the variable when NumPy is imported; later children must not inherit it."""
    code = (
        "import os, sys\n"
        "from precast.cli import main\n"
        f"own, name, seen = {own!r}, 'OPENBLAS_NUM_THREADS', []\n"
        "os.environ.pop(name, None)\n"
        "if own: os.environ[name] = own\n"
        "class Watch:\n"
        "    def find_spec(module, path=None, target=None):\n"
        "        if module == 'numpy': seen.append(os.environ.get(name))\n"
        "sys.meta_path.insert(0, Watch)\n"
        "main(['run', sys.argv[1], '--ids', '7,200,31', '-n', '1'], standalone_mode=False)\n"
        "assert seen == [own or '1'], seen\n"
        "assert os.environ.get(name) == own"
    )
    result = python("-c", code, str(tiny_artifact))
    assert result.returncode == 0, result.stderr
