"""The SavedModel for other tools: its files, and its answers in TensorFlow without precast."""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from precast.exporter.export import export
from precast.exporter.models.registry import read_model
from precast.exporter.options import ExportOptions
from precast.exporter.programs import TABLES, Geometry, build_programs, stored_model
from precast.exporter.reference import recording
from precast.exporter.targets import savedmodel as builder
from precast.exporter.targets.kinds import TARGET_KINDS
from precast.exporter.weights import plan_weights, write_model_weights
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.audit.verify import DO_NOT_USE, ReplayReport
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load
from precast.loaders.locate import read_manifest
from precast.loaders.runtime.savedmodel import manifest_name, signature_name

PROMPT = [7, 300, 12, 5, 101]
FOLDER = "programs/savedmodel"

# This script prefills and decodes without precast, and uses only the manifest.
GENERATE = """
import json, sys
sys.modules["jax"] = sys.modules["jaxlib"] = sys.modules["precast"] = None
import tensorflow as tf

folder, prompt, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
signatures = tf.saved_model.load(folder).signatures
caches = signatures["cache"]()
tokens = tf.constant(prompt + [0] * (8 - len(prompt)))
scalars = {"length": len(prompt), "start": 0, "slot": 0}
inputs = {"tokens": tokens, **{name: tf.constant(value) for name, value in scalars.items()}}
signature, answer = signatures["prefill_8"], []
for position in range(len(prompt), len(prompt) + count):
    results = signature(**inputs, **caches)
    answer.append(int(results["token"][0]))
    caches = {name: results[name] for name in caches}
    signature = signatures["decode"]
    inputs = {"tokens": results["token"], "positions": tf.constant([position]), "slots": tf.constant([0])}
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def answer(savedmodel_artifact) -> list[int]:
    """Return the answer of the compiled target."""
    model = load(savedmodel_artifact, trusted=True)
    assert model.target.runtime == "pjrt"
    return list(model.generate(PROMPT, SamplingParams(max_tokens=12, ignore_eos=True)).token_ids)


def test_tensorflow_alone_generates_the_tokens_of_the_compiled_target(savedmodel_artifact, answer, python):
    folder = savedmodel_artifact / FOLDER
    result = python("-c", GENERATE, str(folder), json.dumps(PROMPT), str(len(answer)))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == answer


def test_saved_model_cli_shows_a_signature_for_each_program(savedmodel_artifact):
    command = [Path(sys.executable).parent / "saved_model_cli", "show", "--dir", savedmodel_artifact / FOLDER]
    command += ["--tag_set", "serve"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    keys = [line.split('"')[1] for line in shown.splitlines() if line.startswith("SignatureDef key")]
    names = {k for k in keys if not k.startswith("__")}
    assert names == {"cache", "prefill_8", "prefill_16", "decode", "score"}


def test_the_manifest_describes_the_target(savedmodel_artifact):
    manifest = read_manifest(savedmodel_artifact)
    target = next(t for t in manifest.targets if t.runtime == "savedmodel")
    assert (target.name, target.platform, target.device, target.machine) == (
        "savedmodel",
        "any",
        "any",
        "any",
    )
    assert (target.jaxlib, target.cpu_features, target.kernel_abi, target.kernels) == ("any", (), 0, ())
    for program in target.programs:
        assert (program.executable, program.stablehlo, program.memory) == (
            f"{FOLDER}/saved_model.pb",
            None,
            None,
        )
        assert {v.role for v in program.arguments}.isdisjoint({"table", "weight"})
        assert {v.alias for v in program.results} == {None}
    written = {
        p.relative_to(savedmodel_artifact).as_posix() for p in savedmodel_artifact.rglob("*") if p.is_file()
    }
    assert written - {"manifest.json"} == set(manifest.files)
    # TensorFlow's fingerprint contains a random number, so exports would differ.
    assert not [name for name in written if "fingerprint" in name]
    # There are no empty folders, so a copy of the files is complete.
    assert all(any(p.iterdir()) for p in savedmodel_artifact.rglob("*") if p.is_dir())


def sizes(artifact: Path) -> tuple[int, int, int]:
    """Return the bytes of the graph, of the variables, and of the artifact's own weights."""
    folder = artifact / FOLDER
    variables = sum(p.stat().st_size for p in (folder / "variables").glob("variables.data*"))
    return (
        (folder / "saved_model.pb").stat().st_size,
        variables,
        (artifact / "weights.safetensors").stat().st_size,
    )


def written(source, folder: Path) -> Path:
    """Write the weights and the SavedModel of an artifact, and nothing else."""
    kind, spec = TARGET_KINDS["savedmodel"], read_model(source.config, source.name).with_context(64)
    stored = stored_model(spec, "float32")
    tables = dict(zip(TABLES, spec.tables(64), strict=True))
    plan = plan_weights(spec.adapt(source), stored.parameters, tied=False)
    write_model_weights(folder / "weights.safetensors", plan, stored.formats, tables, lambda _: None)
    geometry = Geometry(context=64, slots=1, buckets=(8, 16))
    programs = build_programs(stored, geometry, kind.ops)
    builder.build_savedmodel(kind, programs, folder, date.today(), lambda _: None)
    return folder


def test_weights_are_variables_stored_once_and_the_graph_does_not_grow_with_them(
    savedmodel_artifact, tiny_source, tmp_path
):
    """The message of a graph is limited to 2 GB, so weights as constants would not fit."""
    # 20,000 tokens instead of 320: 7.6 MB more of weights.
    large = written(tiny_source(config={"vocab_size": 20_000}), tmp_path)
    graph, variables, weights = sizes(savedmodel_artifact)
    large_graph, large_variables, large_weights = sizes(large)
    assert large_weights - weights > 7_000_000
    assert graph < 1_000_000
    assert abs(large_graph - graph) < 5_000
    for stored, once in ((variables, weights), (large_variables, large_weights)):
        assert abs(stored - once) < 10_000


def test_a_full_disk_raises_os_error(savedmodel_packages, tiny_source, tmp_path, monkeypatch):
    """An export cleans up after an OSError."""
    import tensorflow
    from orbax import export

    def save(*_):
        raise tensorflow.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(export.ExportManager, "save", save)
    with pytest.raises(OSError, match="No space left on device"):
        written(tiny_source(), tmp_path)


def test_names_of_signatures_translate_back_to_the_manifest_s(tiny_source):
    source = tiny_source(config={"model_type": "mistral", "sliding_window": 8})
    model = stored_model(read_model(source.config, source.name), "int8")
    geometry = Geometry(context=64, slots=1, buckets=(8,), kv_cache="int8")
    programs = build_programs(model, geometry, TARGET_KINDS["savedmodel"].ops)
    names = {
        v.name for p in programs for v in (*p.arguments, *p.results) if v.role not in ("table", "weight")
    }
    assert "cache.window_8.key_scale" in names
    assert {signature_name(n) for n in names if n.endswith("key_scale")} == {"cache__window_8__key_scale"}
    assert all("." not in signature_name(n) and manifest_name(signature_name(n)) == n for n in names)


def test_an_export_replays_the_golden_answers(savedmodel_packages, tmp_path, tiny_source, monkeypatch):
    def replay(model, recorded, where, progress):
        nothing = {"answers": 0, "tokens": 0, "logits": 0, "difference": 0.0, "share": 0.0}
        assert model.target.runtime == "savedmodel"
        assert max(len(answer.token_ids) for answer in recorded.greedy) == 4
        assert any(len(answer.prompt_token_ids) > 8 for answer in recorded.greedy), "a chunked prompt"
        problem = f"{where}: answer 0: token 0 is 1, but 2 was recorded; {DO_NOT_USE}"
        return ReplayReport(target=model.target.name, problems=(problem,), **nothing)

    monkeypatch.setattr(recording, "replay", replay)
    options = ExportOptions(buckets=(8,), context=64, targets=("cpu", "savedmodel"))
    with pytest.raises(PrecastError) as raised:
        export(tiny_source(), tmp_path / "a", options)
    assert str(raised.value).endswith(
        "target 'savedmodel': answer 0: token 0 is 1, but 2 was recorded; nothing was written: please report this."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("there", "sentence"),
    [
        ((), "needs orbax-export and TensorFlow, which are not installed"),
        (("tensorflow",), "needs orbax-export, which is not installed"),
        (("orbax.export",), "needs TensorFlow, which is not installed"),
    ],
)
def test_missing_packages_are_named_before_anything_is_written(
    there, sentence, monkeypatch, tiny_source, tmp_path
):
    monkeypatch.setattr(builder, "find_spec", lambda name: object() if name in there else None)
    with pytest.raises(PrecastError) as raised:
        export(tiny_source(), tmp_path / "out", ExportOptions(targets=("cpu", "savedmodel")))
    assert str(raised.value) == (
        f"exporting a SavedModel {sentence}: pip install 'precast[export-savedmodel]'"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_blocked_package_counts_as_missing(monkeypatch):
    def refuse(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(builder, "find_spec", refuse)
    with pytest.raises(PrecastError, match="which are not installed"):
        builder.check_packages()
