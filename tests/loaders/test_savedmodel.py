"""Running a SavedModel with TensorFlow alone, and only with files that the manifest lists."""

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from precast.loaders.artifact import compat
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.machine import Machine
from precast.loaders.generation.engine import DecodeRow
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load
from precast.loaders.locate import read_manifest
from precast.loaders.runtime import installed, savedmodel

FOLDER = "programs/savedmodel"
PROMPTS = [[7], [300, 12, 5, 101], list(range(20, 28)), list(range(40, 80))]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model(savedmodel_artifact):
    """Return the tiny artifact's model, run by TensorFlow."""
    return load(savedmodel_artifact, target="savedmodel", trusted=True, log=lambda _: None)


@pytest.fixture
def copy(savedmodel_artifact, tmp_path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(savedmodel_artifact, tmp_path / "copy"))


@pytest.fixture
def no_tensorflow(monkeypatch):
    """Fail the test if any part of TensorFlow is used."""

    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(f"TensorFlow was asked for {name}")

    monkeypatch.setattr(savedmodel, "import_tensorflow", Untouchable)


def refusal(artifact: Path, **options) -> str:
    with pytest.raises(PrecastError) as raised:
        load(artifact, **{"target": "savedmodel", "trusted": True, "log": lambda _: None, **options})
    return str(raised.value)


def accept(artifact: Path, name: str) -> None:
    """Update the manifest with the hash of a changed file."""
    data = (artifact / name).read_bytes()
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (artifact / "manifest.json").write_text(json.dumps(manifest))


# --- answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_its_tokens_are_the_compiled_target_s(savedmodel_artifact, model, prompt):
    compiled = load(savedmodel_artifact, trusted=True)
    assert compiled.target.runtime == "pjrt"
    assert model.generate(prompt, GREEDY).token_ids == compiled.generate(prompt, GREEDY).token_ids


def test_its_logits_are_the_reference_s_to_rounding(model, reference):
    engine, ids = model.engine, [int(i) for i in np.random.default_rng(5).integers(0, 320, 64)]
    expected = reference(ids)
    for length in (1, 8, 9, 33):
        cache = engine.new_cache()
        step = engine.prefill(ids[:length], cache)
        np.testing.assert_allclose(engine.logits(step)[0], expected[length - 1], rtol=2e-4, atol=2e-4)
        step = engine.decode([DecodeRow(0, ids[length], length)], cache)
        np.testing.assert_allclose(engine.logits(step)[0], expected[length], rtol=2e-4, atol=2e-4)


def test_small_weights_an_int8_cache_windows_and_slots(windowed_savedmodel):
    """The operations are those of the portable target, compiled by another version of XLA."""
    logits = []
    for target in ("savedmodel", "portable"):
        engine = load(
            windowed_savedmodel, target=target, allow_compile=True, trusted=True, log=lambda _: None
        ).engine
        cache = engine.new_cache()
        rows = [engine.logits(engine.prefill(PROMPTS[3], cache, slot=1))[0]]
        for position in range(len(PROMPTS[3]), len(PROMPTS[3]) + 4):
            step = engine.decode([DecodeRow(1, position, position)], cache)
            rows.append(engine.logits(step)[0])
        logits.append(np.array(rows))
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-3 * np.std(logits))


def test_the_command_line_runs_it_and_logs_it(cli, savedmodel_artifact):
    arguments = ("run", savedmodel_artifact, "--ids", "7,300,12", "-n", 5, "--json")
    result = cli(*arguments, "--target", "savedmodel")
    assert result.exit_code == 0, result.stderr
    told, compiled = json.loads(result.stdout), json.loads(cli(*arguments).stdout)
    assert (told["target"], told["compiles"], compiled["compiles"]) == ("savedmodel", 5, 0)
    assert told["token_ids"] == compiled["token_ids"]
    assert (
        f"{savedmodel_artifact}: TensorFlow runs target 'savedmodel', and compiles each program when it is first called"
        in result.stderr
    )


WITHOUT_JAX = """
import json, sys
sys.modules["jax"] = None
from precast.loaders.load import load
from precast.loaders.runtime import installed, pjrt
from precast.loaders.generation.sampling_params import SamplingParams

installed.this_machine()
assert "tensorflow" not in sys.modules
model = load(sys.argv[1], target="savedmodel", trusted=True, log=lambda _: None)
print(json.dumps(model.generate([7, 300, 12], SamplingParams(max_tokens=6, ignore_eos=True)).token_ids))
assert pjrt._clients == {}, "a client of jaxlib's was made"
assert "weights.safetensors" not in open("/proc/self/maps").read(), "the weights are mapped"
assert not [name for name in sys.modules if name.partition(".")[0] in ("flax", "orbax")]
"""


def test_it_runs_where_jax_cannot_be_imported_and_without_a_client_of_jaxlib_s(
    python, savedmodel_artifact, model
):
    result = python("-c", WITHOUT_JAX, str(savedmodel_artifact))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == list(model.generate([7, 300, 12], GREEDY).token_ids[:6])
    assert result.stderr == ""


def test_refused_arguments_have_an_error_text(model):
    decode = next(p for p in model.target.programs if p.kind == "decode")
    arguments = [np.zeros((*v.shape, 2), v.dtype) for v in decode.arguments]
    with pytest.raises(
        PrecastError,
        match=r"^TensorFlow: program 'decode' failed \(.*\); check the artifact with precast verify\.$",
    ):
        model.engine._decodes[0].executable(arguments)


# --- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "saved_model.pb",
        "variables/variables.index",
        "variables/variables.data-00000-of-00001",
    ],
)
def test_an_altered_file_is_refused_before_tensorflow_reads_any(copy, no_tensorflow, name):
    path = copy / FOLDER / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"file '{FOLDER}/{name}' has sha256" in refusal(copy)
    path.write_bytes(data[:-1])
    assert "it has been truncated or altered" in refusal(copy)
    path.unlink()
    assert f"file '{FOLDER}/{name}' is missing" in refusal(copy)


@pytest.mark.parametrize("name", ["saved_model.pbtxt", "assets/vocabulary", "assets.extra/x", "variables/x"])
def test_an_unlisted_file_in_its_folder_is_refused(copy, no_tensorflow, name):
    """TensorFlow would prefer saved_model.cpb, for example, to saved_model.pb."""
    path = copy / FOLDER / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    assert refusal(copy) == (
        f"{copy}: file '{FOLDER}/{name}' is not listed in the manifest, and TensorFlow would read it; remove it, or"
        " copy or export the artifact again."
    )


def test_a_link_in_its_folder_is_refused(copy, no_tensorflow, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (copy / FOLDER / "assets").symlink_to(tmp_path / "elsewhere")
    assert f"file '{FOLDER}/assets' is not listed" in refusal(copy)
    (copy / FOLDER / "assets").unlink()
    (copy / FOLDER / "variables").rename(tmp_path / "variables")
    (copy / FOLDER / "variables").symlink_to(tmp_path / "variables")
    assert "variables" in refusal(copy)


@pytest.fixture
def folders_listed(monkeypatch) -> list[Path]:
    """Record the folders that the runtime lists."""
    listed, scan = [], savedmodel.os.scandir

    def scandir(folder):
        listed.append(Path(folder))
        return scan(folder)

    monkeypatch.setattr(savedmodel.os, "scandir", scandir)
    return listed


@pytest.mark.parametrize("where", ["..", "../..", "../outside", "programs/../../outside", "/", "./programs"])
def test_no_folder_outside_the_artifact_is_looked_into(artifact_copy, no_tensorflow, folders_listed, where):
    outside = artifact_copy.parent / "outside"
    outside.mkdir()
    (outside / "secret").touch()
    executable = f"{where}/saved_model.pb"
    assert refused_executable(artifact_copy, executable) == (
        f"{artifact_copy}: {executable!r} is not a valid name for a file of an artifact; copy or export the"
        " artifact again."
    )
    assert folders_listed == []


@pytest.mark.parametrize("link", ["a", "a/b"])
def test_a_link_in_place_of_its_folder_is_not_followed(artifact_copy, no_tensorflow, folders_listed, link):
    outside = artifact_copy.parent / "outside"
    (outside / "b").mkdir(parents=True)
    for folder in (outside, outside / "b"):
        (folder / "saved_model.pb").touch()
    (artifact_copy / link).parent.mkdir(exist_ok=True)
    (artifact_copy / link).symlink_to(outside)
    text = refused_executable(artifact_copy, f"{link}/saved_model.pb")
    assert "to be a plain file inside the artifact, found a symlink or a folder" in text
    assert folders_listed == []


def refused_executable(artifact: Path, executable: str) -> str:
    """Return the error for a target whose programs are in `executable`, according to the manifest."""
    manifest = read_manifest(artifact)
    programs = tuple(dataclasses.replace(p, executable=executable) for p in manifest.targets[0].programs)
    target = dataclasses.replace(manifest.targets[0], runtime="savedmodel", programs=programs)
    with pytest.raises(PrecastError) as raised:
        savedmodel.load(artifact, target, manifest.files, rehash=False)
    return str(raised.value)


def test_verify_reports_an_unlisted_file_in_its_folder(cli, copy):
    (copy / FOLDER / "assets").mkdir()
    (copy / FOLDER / "assets/x").touch()
    result = cli("verify", copy, "--target", "savedmodel")
    assert result.exit_code == 1
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith(f"error: {copy}: '{FOLDER}/assets/x' is not listed in the manifest")


def test_rehash_includes_files_that_it_does_not_read(copy):
    data = bytearray((copy / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "weights.safetensors").write_bytes(data)
    assert "'weights.safetensors' has sha256" in refusal(copy, rehash=True)
    load(copy, target="savedmodel", trusted=True, log=lambda _: None)


@pytest.mark.parametrize("executable", ["tokenizer.json", "golden.json"])
def test_executables_that_are_no_savedmodel_are_refused(copy, no_tensorflow, edit_manifest, executable):
    def change(manifest):
        target = next(t for t in manifest["targets"] if t["runtime"] == "savedmodel")
        target["programs"][0]["executable"] = executable

    edit_manifest(copy, change)
    assert "expected all programs to share one saved_model.pb inside a folder" in refusal(copy)


# --- operations ----------------------------------------------------------------------------------------------


def edit_graph(artifact: Path, change) -> None:
    """Apply a function to the SavedModel's message, and update the hash in the manifest."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    path = artifact / FOLDER / "saved_model.pb"
    message = SavedModel.FromString(path.read_bytes())
    change(message)
    path.write_bytes(message.SerializeToString())
    accept(artifact, f"{FOLDER}/saved_model.pb")


def concrete(message, part: str):
    """Return a function that the graph runs, by a part of its name."""
    graph = message.meta_graphs[0]
    run = set(graph.object_graph_def.concrete_functions)
    return next(
        f for f in graph.graph_def.library.function if part in f.signature.name and f.signature.name in run
    )


def test_an_operation_that_no_export_has_is_refused(copy):
    def write_a_file(message):
        concrete(message, "signature_wrapper").node_def.add(name="evil", op="WriteFile")

    edit_graph(copy, write_a_file)
    assert refusal(copy) == (
        f"{copy / FOLDER / 'saved_model.pb'}: calls TensorFlow's WriteFile, which no export contains: do not run it;"
        " export the model again."
    )


def test_the_function_that_saves_variables_may_not_be_called(copy):
    """Every SavedModel contains this function, which writes files, for other loaders; no signature calls it."""

    def call_it(message):
        functions = message.meta_graphs[0].graph_def.library.function
        save = next(f.signature.name for f in functions if "traced_save" in f.signature.name)
        node = concrete(message, "signature_wrapper").node_def.add(name="evil", op="PartitionedCall")
        node.attr["f"].func.name = save

    edit_graph(copy, call_it)
    assert "SaveV2" in refusal(copy)


def test_a_graph_that_would_be_run_around_its_functions_is_refused(copy):
    edit_graph(copy, lambda message: message.meta_graphs[0].ClearField("object_graph_def"))
    assert "expected one graph of TensorFlow 2" in refusal(copy)
    edit_graph(copy, lambda message: message.ClearField("meta_graphs"))
    assert "expected one graph of TensorFlow 2" in refusal(copy)


def test_a_file_other_than_a_savedmodel_has_an_error_text(copy):
    (copy / FOLDER / "saved_model.pb").write_bytes(b"\xff" * 100)
    accept(copy, f"{FOLDER}/saved_model.pb")
    assert "expected a SavedModel, found something else" in refusal(copy)


def test_tensorflow_s_failure_has_an_error_text(copy):
    path = copy / FOLDER / "variables/variables.index"
    path.write_bytes(b"")
    accept(copy, f"{FOLDER}/variables/variables.index")
    assert "does not load this SavedModel (" in refusal(copy)


def test_a_missing_signature_is_refused(copy, edit_manifest):
    def rename(manifest):
        target = next(t for t in manifest["targets"] if t["runtime"] == "savedmodel")
        next(p for p in target["programs"] if p["name"] == "decode")["name"] = "decoding"

    edit_manifest(copy, rename)
    assert ": has no signature 'decoding'" in refusal(copy)


def test_signatures_of_another_model_are_refused(copy, windowed_savedmodel):
    for name in ("saved_model.pb", "variables/variables.index", "variables/variables.data-00000-of-00001"):
        shutil.copy(windowed_savedmodel / FOLDER / name, copy / FOLDER / name)
        accept(copy, f"{FOLDER}/{name}")
    assert "signature 'cache': expected results {'cache__keys': 'float32 (3, 1, 2, 64, 12)'" in refusal(copy)


# --- threads --------------------------------------------------------------------------------------------------

THREADS = """
import sys
from pathlib import Path
from precast.loaders.load import load
from precast.loaders.generation.sampling_params import SamplingParams

def run(threads):
    messages = []
    model = load(sys.argv[1], target="savedmodel", trusted=True, threads=threads, log=messages.append)
    model.generate([7, 300, 12], SamplingParams(max_tokens=2, ignore_eos=True))
    import tensorflow as tf
    print(tf.config.threading.get_intra_op_parallelism_threads(), *messages[1:])

if sys.argv[2] == "host first":
    import tensorflow as tf
    tf.constant(1)
for threads in map(int, sys.argv[3:]):
    run(threads or None)
"""


@pytest.mark.parametrize(
    ("host", "threads", "expected"),
    [
        ("no host", (3, 3, 5), ("3", "3", "3 ignored")),
        ("no host", (0, 3), ("0", "0 ignored")),
        ("host first", (3, 0), ("0 ignored", "0")),
    ],
)
def test_tensorflow_takes_a_number_of_threads_once(savedmodel_artifact, python, host, threads, expected):
    """In TensorFlow's settings, 0 means the default; precast's None leaves the settings unchanged."""
    result = python("-c", THREADS, str(savedmodel_artifact), host, *map(str, threads))
    assert result.returncode == 0, result.stderr
    ignored = (
        f"{savedmodel_artifact}: TensorFlow already runs in this process, so the number of threads is ignored"
    )
    assert result.stdout.splitlines() == [line.replace("ignored", ignored) for line in expected]


# --- where it runs --------------------------------------------------------------------------------------------


def bare(**fields) -> Machine:
    """Return a machine that no executable fits."""
    known = {"machine": "none", "features": (), "jaxlib": "0", "kernel_abi": 0, "kernels": ()}
    return Machine(**(known | fields))


def test_it_is_chosen_when_nothing_else_fits(savedmodel_artifact):
    manifest = read_manifest(savedmodel_artifact)

    def chosen(machine):
        return compat.choose_target(manifest, machine, "here", name=None, allow_compile=False).runtime

    assert chosen(bare(tensorflow=True)) == "savedmodel"
    assert chosen(installed.this_machine()) == "pjrt"
    with pytest.raises(PrecastError) as raised:
        chosen(bare())
    assert (
        "target 'savedmodel': it needs TensorFlow, which is not installed: pip install 'precast[savedmodel]'"
        in str(raised.value)
    )


def test_the_machine_states_if_tensorflow_is_installed(monkeypatch):
    assert installed.this_machine().tensorflow == (importlib.util.find_spec("tensorflow") is not None)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert installed.this_machine().tensorflow is False


def test_a_tensorflow_that_cannot_be_imported_has_an_error_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(PrecastError) as raised:
        savedmodel.client()
    assert str(raised.value).startswith("a SavedModel needs TensorFlow, which cannot be imported (")
    assert str(raised.value).endswith("): pip install 'precast[savedmodel]'")
