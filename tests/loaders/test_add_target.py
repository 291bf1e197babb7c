"""``precast add-target``: the new target, and refusals. `test_target_files` tests interrupted and concurrent runs."""

import hashlib
import json

import pytest

from precast.loaders import add_target as adding
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.machine import cpu_features
from precast.loaders.compiling import compiler as compiling
from precast.loaders.compiling import isa
from precast.loaders.console.add_target import lines as summary_lines
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load
from precast.loaders.locate import read_manifest
from precast.loaders.runtime import pjrt

pytestmark = pytest.mark.skipif(
    isa.widest_level(cpu_features()) in (None, "x86-64-v2"), reason="this CPU has no wider instruction set"
)
EXPORTED, NAME = "cpu-x86-64-v2", "cpu-x86-64-v3"
PROMPT = [7, 200, 31]


# --- what is added ------------------------------------------------------------------------------------------


def test_a_target_is_added_and_nothing_else_changes(add, artifact_copy, tiny_model, tree):
    before, weights = tree(artifact_copy), (artifact_copy / "weights.safetensors").stat()
    added, _ = add()
    after, manifest = tree(artifact_copy), read_manifest(artifact_copy)
    assert after.keys() - before.keys() == {
        f"programs/{NAME}/{p}.xla" for p in ("cache", "prefill_8", "prefill_16", "decode", "score")
    }
    assert [name for name in before if after[name] != before[name]] == ["manifest.json"]
    assert (artifact_copy / "weights.safetensors").stat() == weights
    assert [t.name for t in manifest.targets] == [EXPORTED, "portable", NAME]
    assert (added.target, added.has_replaced, added.signature_removed) == (manifest.targets[-1], False, False)
    assert manifest.targets[-1].programs[0].stablehlo == manifest.targets[0].programs[0].stablehlo
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    model = load(artifact_copy, target=NAME, rehash=True)
    assert model.generate(PROMPT, params).token_ids == tiny_model.generate(PROMPT, params).token_ids
    assert model.compiles == 0
    # From now on, the target with the higher level is chosen.
    assert load(artifact_copy).target.name == NAME


def test_the_user_is_told_the_result(add, artifact_copy):
    (artifact_copy / "manifest.json.sig").write_text("signed")
    added, messages = add()
    assert messages[-1] == "checking its answers against the recorded ones"
    lines = list(summary_lines(added, artifact_copy))
    assert lines[0].startswith(f"{artifact_copy}: target {NAME} added: 5 programs, ")
    assert lines[0].endswith(f"jaxlib {pjrt.jaxlib_version}, {added.answers} answers as recorded")
    assert lines[1].startswith(
        "  runs on Intel since Haswell (2013), AMD since Excavator (2015) (x86-64-v3); not "
    )
    assert lines[2].startswith("  manifest.json.sig was removed, because it signed the old manifest; sign")
    assert lines[3] == f"  run it with: precast run {artifact_copy} --target {NAME}"
    assert not (artifact_copy / "manifest.json.sig").exists()


def test_neither_jax_nor_a_trace_is_needed(artifact_copy, python):
    code = f"""
import sys
from precast.cli import main
try:
    main(["add-target", {str(artifact_copy)!r}, "--cpu-isa", "x86-64-v3"])
except SystemExit as end:
    assert end.code == 0, end.code
assert "jax" not in sys.modules
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert f"target {NAME} added: 5 programs" in result.stdout
    for program in ("cache", "prefill_8", "prefill_16", "decode", "score"):
        assert f"compiling {program} from StableHLO for x86-64-v3 …" in result.stderr
    assert load(artifact_copy, target=NAME).compiles == 0


def test_another_jaxlibs_target_keeps_its_name(add, artifact_copy, edit_manifest):
    edit_manifest(artifact_copy, lambda m: m["targets"][0].update(jaxlib="0.9.9"))
    added, _ = add(None)  # which is what the export made, too
    assert added.target.name == f"{EXPORTED}-jaxlib{pjrt.jaxlib_version}"
    assert load(artifact_copy).target.name == added.target.name


def test_the_portable_form_is_compiled_on_request(add, artifact_copy):
    added, _ = add(None, source="portable")
    assert added.target.name.startswith("portable-x86-64-v")
    assert set(added.target.cpu_features) <= set(cpu_features())
    assert (added.target.kernels, added.target.kernel_abi) == ((), 0)


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_taken_name_is_refused(add, refused, artifact_copy):
    add()
    assert refused() == (
        f"{artifact_copy}: target {NAME!r} exists already; replace it with --overwrite, or run it with --target"
        f" {NAME}."
    )
    assert f"target {EXPORTED!r} exists already" in refused(None)


def test_overwrite_replaces(add, artifact_copy, tree):
    add()
    for _ in range(3):
        added, _ = add(overwrite=True)
        assert added.has_replaced
        manifest = read_manifest(artifact_copy)
        assert [t.name for t in manifest.targets].count(NAME) == 1
        assert load(artifact_copy, target=NAME, rehash=True).compiles == 0
        listed = set(manifest.files) | {"manifest.json"}
        assert set(tree(artifact_copy)) == listed
    # Also one of the export's own, whose StableHLO stays.
    add(None, overwrite=True)
    assert not list((artifact_copy / "programs" / "cpu").glob("*.xla"))
    assert load(artifact_copy, target=EXPORTED, rehash=True).target.name == EXPORTED


def test_a_source_or_level_that_cannot_be_compiled_is_refused(refused, artifact_copy, monkeypatch):
    assert refused("mmx").startswith(
        "--cpu-isa: expected one of x86-64-v2, x86-64-v3, x86-64-v4, native, found 'mmx'"
    )
    assert refused(source="gpu") == (
        f"{artifact_copy}: target 'gpu' is not in the artifact, or has no StableHLO for a CPU; name a"
        f" target that has StableHLO: {EXPORTED!r}, 'portable'."
    )
    monkeypatch.setattr(isa, "cpu_features", lambda: isa.LEVELS["x86-64-v2"].features)
    assert "x86-64-v3 needs CPU features that this machine lacks (avx, avx2, bmi" in refused("x86-64-v3")


def test_altered_stablehlo_is_refused(refused, artifact_copy):
    path = artifact_copy / "programs" / "cpu" / "decode.stablehlo"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert "file 'programs/cpu/decode.stablehlo' has sha256" in refused()


def test_an_artifact_with_other_damage_is_refused(refused, artifact_copy):
    path = artifact_copy / "programs" / "cpu" / "decode.xla"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert "file 'programs/cpu/decode.xla' has sha256" in refused()


def test_wrong_answers_are_refused(refused, artifact_copy, edit_manifest):
    golden = artifact_copy / "golden.json"
    recorded = json.loads(golden.read_text())
    answer = next(a for a in recorded["greedy"] if a["token_ids"])
    answer["token_ids"][0] = (answer["token_ids"][0] + 1) % 300
    golden.write_text(json.dumps(recorded))
    data = golden.read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(artifact_copy, lambda m: m["files"].update({"golden.json": entry}))
    text = refused()
    assert f"{artifact_copy}: target {NAME!r}: answer " in text
    assert text.endswith("; the artifact is unchanged.")


@pytest.mark.parametrize("name", ["a/b", "/decode", "..", "a\0b", "a\\b", ""])
def test_a_program_without_a_file_name_is_refused(refused, artifact_copy, edit_manifest, monkeypatch, name):
    monkeypatch.setattr(adding, "compile_target", None)  # not reached
    edit_manifest(
        artifact_copy, lambda m: [t["programs"][-1].update(name=name) for t in m["targets"] if t["programs"]]
    )
    text = refused()
    assert "is not a valid name for a file of an artifact" in text or text == (
        f"{artifact_copy}: target {EXPORTED!r} has a program 'a/b', expected names without '/'; export the"
        " model again."
    )


def test_stablehlo_that_jaxlib_refuses(artifact_copy):
    text = ""
    with pytest.raises(PrecastError) as raised:
        compiling.compile_programs([("decode", b"junk")], "x", isa="x86-64-v2", log=lambda _: None)
    text = str(raised.value)
    assert text.startswith(
        f"x: program 'decode': jaxlib {pjrt.jaxlib_version} does not compile this StableHLO"
    )
    assert text.endswith("XLA may be able to compile it for a wider level: try --cpu-isa x86-64-v3.")


def test_a_compiler_that_crashes_has_an_error_text(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_there_is_no_such_flag=1")  # which ends the process that loads XLA
    with pytest.raises(
        PrecastError, match=r"^x: the compiler ended unexpectedly while it compiled program 'decode'"
    ):
        compiling.compile_programs([("decode", b"junk")], "x", log=lambda _: None)
