"""Loading an artifact: no tracing, no compiling, no jax, and only files that match the manifest."""

import json
import re
import shutil
from pathlib import Path

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.engine import DecodeRow
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load
from precast.loaders.locate import find_artifact, read_manifest
from precast.loaders.runtime import pjrt

PROMPT = [7, 200, 31]
FREE = SamplingParams(ignore_eos=True)


@pytest.fixture(scope="module")
def answer(tiny_model):
    return tiny_model.generate(PROMPT, FREE).token_ids


def refusal(path, **options) -> str:
    with pytest.raises(PrecastError) as raised:
        load(path, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- finding it ---------------------------------------------------------------------------------------------


def test_an_artifact_is_found_by_its_folder_or_the_folder_around_it(tiny_artifact):
    assert find_artifact(tiny_artifact) == tiny_artifact
    assert find_artifact(tiny_artifact.parent) == tiny_artifact


def test_remains_of_an_interrupted_export_are_not_found(tmp_path, tiny_artifact):
    shutil.copytree(tiny_artifact, tmp_path / ".tiny.abc.partial")
    with pytest.raises(PrecastError, match=r"contains no manifest\.json"):
        find_artifact(tmp_path)
    shutil.copytree(tiny_artifact, tmp_path / "tiny")
    assert find_artifact(tmp_path) == tmp_path / "tiny"


def test_a_path_without_an_artifact_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "two" / "b").mkdir(parents=True)
    (tmp_path / "two" / "a").mkdir()
    for name in ("a", "b"):
        (tmp_path / "two" / name / "manifest.json").write_text("{}")
    texts = {
        "nowhere": "expected the folder of an artifact, but it does not exist; make an artifact with precast"
        " export, or check the path.",
        "file": "expected the folder of an artifact, but it is a file; make an artifact with precast export, or"
        " check the path.",
        "file/below": "expected the folder of an artifact, but it does not exist; make an artifact with precast"
        " export, or check the path.",
        "empty": "expected the folder of an artifact, but it contains no manifest.json; make an artifact with"
        " precast export, or check the path.",
        "two": "expected one artifact, found 2 (a, b); name one of them.",
    }
    for name, text in texts.items():
        assert refusal(tmp_path / name) == f"{tmp_path / name}: {text}"


def test_the_source_of_an_artifact_is_refused_with_the_command_that_makes_one(tmp_path, monkeypatch):
    folders = ("a model", "one", "two", "hidden/.old/a", "artifacts/a", "artifacts/b", "deep/er/c", "org")
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    for name in (
        "a model/config.json",
        "a model/model.safetensors",
        "one/x.gguf",
        "two/x.gguf",
        "two/y.gguf",
    ):
        (tmp_path / name).write_text("")
    (tmp_path / "renamed.bin").write_bytes(b"GGUF\3\0")
    (tmp_path / "model.GGUF").write_bytes(b"")
    for name in ("artifacts/a", "artifacts/b", "deep/er/c", "hidden/.old/a"):
        (tmp_path / name / "manifest.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    make = "expected an artifact, found {}; make an artifact of it with: precast export {}"
    expected = {
        "model.GGUF": make.format("a GGUF file", "model.GGUF"),
        "renamed.bin": make.format("a GGUF file", "renamed.bin"),
        "one": make.format("a GGUF file in it", "one/x.gguf"),
        "two": "expected the folder of an artifact, but it contains no manifest.json; make an artifact with precast"
        " export, or check the path.",
        "a model": make.format("a Hugging Face model", "'a model'"),
        "a model/model.safetensors": make.format("weights of a Hugging Face model", "'a model'"),
        "artifacts": "expected one artifact, found 2 (a, b); name one of them.",
        ".": "expected an artifact, found 2 (artifacts/a, artifacts/b); name one of them.",
        "elsewhere/model-1.5B": "expected the folder of an artifact, but it does not exist; export the model of this"
        " name from the Hugging Face hub with: precast export elsewhere/model-1.5B",
        "org/model": "expected the folder of an artifact, but it does not exist; make an artifact with precast"
        " export, or check the path.",
    }
    (tmp_path / "deep").rename(tmp_path / ".deep")
    for name, text in expected.items():
        assert refusal(name) == f"{name}: {text}"
    (tmp_path / "artifacts" / "b" / "manifest.json").unlink()
    assert (
        refusal(".") == ".: expected an artifact, found one in a subfolder; name that subfolder: artifacts/a"
    )
    for number in range(20):
        (tmp_path / "artifacts" / f"n{number:02}").mkdir()
        (tmp_path / "artifacts" / f"n{number:02}" / "manifest.json").write_text("{}")
    assert refusal("artifacts").endswith(
        "found 21 (a, n00, n01, n02, n03, n04, n05, n06, … 13 more); name one of them."
    )


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "nul\0"], ids=["long", "deep", "nul"])
def test_a_path_that_no_file_system_takes_is_refused(tmp_path, name):
    assert "expected the folder of an artifact" in refusal(tmp_path / name)


# --- whole and unaltered ------------------------------------------------------------------------------------


def test_a_copy_is_as_good(artifact_copy, answer, own_cache):
    assert load(str(artifact_copy)).generate(PROMPT, FREE).token_ids == answer


def loaded_files(root: Path) -> list[str]:
    compiled = [f"programs/cpu/{n}.xla" for n in ("cache", "prefill_8", "prefill_16", "decode", "score")]
    return [*compiled, "weights.safetensors", "tokenizer.json", "chat_template.jinja"]


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "linked", "empty"])
def test_damage_to_any_file_is_noticed_before_its_use(artifact_copy, own_cache, damage, tmp_path):
    for name in loaded_files(artifact_copy):
        path = artifact_copy / name
        data = path.read_bytes()
        path.unlink()
        if damage == "linked":
            (tmp_path / "elsewhere").write_bytes(data)
            path.symlink_to(tmp_path / "elsewhere")
        elif damage != "missing":
            middle = len(data) // 2
            flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            path.write_bytes({"truncated": data[:-1], "altered": flipped, "empty": b""}[damage])
        text = refusal(artifact_copy)
        assert repr(name) in text
        expected = {
            "missing": "is missing",
            "linked": "to be a plain file inside the artifact, found a symlink",
            "altered": "has sha256",
        }
        assert expected.get(damage, "it has been truncated or altered") in text
        path.unlink(missing_ok=True)
        path.write_bytes(data)
    assert load(artifact_copy).compiles == 0


@pytest.mark.parametrize("name", ["golden.json", "README.md", "programs/portable/decode.stablehlo"])
def test_rehash_includes_files_that_are_not_loaded(artifact_copy, name):
    with (artifact_copy / name).open("ab") as file:
        file.write(b" ")
    load(artifact_copy)
    assert repr(name) in refusal(artifact_copy, rehash=True)


def test_rehash_includes_files_that_were_hashed_before(artifact_copy, own_cache, monkeypatch):
    from precast.loaders.artifact import files

    seen = []
    original = files.digest_of
    monkeypatch.setattr(
        files, "digest_of", lambda file, *rest: seen.append(Path(file.name).name) or original(file, *rest)
    )
    load(artifact_copy)
    load(artifact_copy)
    assert seen == ["weights.safetensors"]
    load(artifact_copy, rehash=True)
    assert seen.count("weights.safetensors") == 2


def test_names_in_the_manifest_cannot_leave_the_artifact(artifact_copy, edit_manifest, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((artifact_copy / "tokenizer.json").read_bytes())

    def outside(manifest):
        manifest["files"]["../tokenizer.json"] = manifest["files"]["tokenizer.json"]
        manifest["tokenizer"]["file"] = "../tokenizer.json"

    edit_manifest(artifact_copy, outside)
    assert "'../tokenizer.json' is not a valid name for a file of an artifact" in refusal(artifact_copy)


def test_weights_that_do_not_fit_the_programs_are_named(artifact_copy, edit_manifest):
    def other_shape(manifest):
        for program in manifest["targets"][0]["programs"][1:]:
            weight = next(a for a in program["arguments"] if a["name"] == "model.norm.weight")
            weight["shape"] = [1, 49]

    edit_manifest(artifact_copy, other_shape)
    assert refusal(artifact_copy).endswith(
        "program 'prefill_8' expects weight 'model.norm.weight' of float32 [1, 49], but weights.safetensors"
        " contains float32 [1, 48]; export the model again."
    )


def test_xla_refuses_an_invalid_executable_in_one_line(artifact_copy, edit_manifest):
    """The hash of the executable is right, so only XLA detects the fault."""
    from precast.loaders.artifact.files import sha256_of

    path = artifact_copy / "programs/cpu/decode.xla"
    path.write_bytes(b"no executable at all")

    def own_up(manifest):
        manifest["files"]["programs/cpu/decode.xla"] = {"bytes": 20, "sha256": sha256_of(path)}

    edit_manifest(artifact_copy, own_up)
    assert f"{path}: XLA does not load this executable" in refusal(artifact_copy)


def test_another_machine_or_jaxlib_is_refused_before_anything_is_read(artifact_copy, edit_manifest):
    def elsewhere(manifest):
        manifest["targets"][0] |= {"jaxlib": "0.9.9", "machine": "riscv64"}
        manifest["targets"][0]["cpu_features"].append("warp")

    edit_manifest(artifact_copy, elsewhere)
    for path in artifact_copy.rglob("*.xla"):
        path.unlink()
    text = refusal(artifact_copy)
    for part in ("jaxlib 0.9.9, but", "is installed", "compiled for riscv64", "lacks (warp)", "--compile"):
        assert part in text


# --- nothing is traced, nothing is compiled -----------------------------------------------------------------


def test_nothing_is_compiled_unasked(tiny_artifact):
    model = load(tiny_artifact, allow_compile=True)  # allowed but not needed
    model.generate(PROMPT, FREE)
    assert model.compiles == 0
    assert model.target.runtime == "pjrt"


def test_the_portable_target_is_compiled_on_request_and_says_so(tiny_artifact, answer, own_cache):
    said = []
    model = load(tiny_artifact, target="portable", allow_compile=True, log=said.append)
    assert model.target.name == "portable"
    assert model.compiles == len(model.target.programs) == 6
    assert said == [f"compiling {p.name} from StableHLO …" for p in model.target.programs]
    assert model.generate(PROMPT, FREE).token_ids == answer


def test_the_portable_target_is_refused_where_compiling_is_not_asked_for(tiny_artifact):
    assert "target 'portable': it must be compiled first" in refusal(tiny_artifact, target="portable")


def test_the_stablehlo_of_the_compiled_target_gives_the_same(artifact_copy, edit_manifest, answer, own_cache):
    """If another jaxlib made the executables, jaxlib compiles their StableHLO, which calls the kernels."""
    edit_manifest(artifact_copy, lambda manifest: manifest["targets"][0].update(jaxlib="0.9.9"))
    assert "or compile from StableHLO with --compile" in refusal(artifact_copy)
    model = load(artifact_copy, allow_compile=True, log=lambda _: None)
    assert model.compiles == 5
    assert model.target.name.startswith("cpu-")
    assert model.target.kernels
    assert model.generate(PROMPT, FREE).token_ids == answer


def test_jax_itself_sees_no_trace_and_no_compilation(tiny_artifact, answer, python):
    """jax's monitoring counts jax's work, and a proxy counts the loader's calls of XLA; both are shown to work."""
    code = f"""
import sys, json, jax
from jax import monitoring
seen = []
monitoring.register_event_duration_secs_listener(lambda event, *_, **__: seen.append(event))
monitoring.register_event_listener(lambda event, **__: seen.append(event))
from precast.loaders.load import load
from precast.loaders.runtime import pjrt
from precast.loaders.generation.sampling_params import SamplingParams

asked = []
class Watched:
    def __init__(self, client):
        self.client = client
    def __getattr__(self, name):
        asked.append(name)
        return getattr(self.client, name)

pjrt.client()._client = Watched(pjrt.client()._client)
model = load({str(tiny_artifact)!r})
ids = model.generate({PROMPT!r}, SamplingParams(ignore_eos=True)).token_ids
work = [e for e in seen if "compile" in e or "trace" in e or "jaxpr" in e]
work += [name for name in asked if "compile" in name]
del seen[:], asked[:]
jax.jit(lambda x: x * 2 + 1)(3.0)
load({str(tiny_artifact)!r}, target="portable", allow_compile=True, log=lambda _: None)
print(json.dumps([ids, model.compiles, work, seen, asked]))
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    ids, compiles, work, control, asked = json.loads(result.stdout)
    assert tuple(ids) == answer
    assert (compiles, work) == (0, [])
    assert any(event.startswith("/jax/core/compile/") for event in control)
    # Programs are compiled in a child process, never in this one.
    assert set(asked) == {"deserialize_executable"}


BLOCKED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {'jax', 'flax', 'transformers', 'safetensors', 'gguf', 'torch'}:
            raise ImportError(name + " is refused here")
sys.meta_path.insert(0, Refuse())
"""


def test_the_loader_works_where_jax_cannot_be_imported(tiny_artifact, answer, python):
    code = f"""{BLOCKED}
from precast.loaders.load import load
from precast.loaders.generation.sampling_params import SamplingParams
print(*load({str(tiny_artifact)!r}).generate({PROMPT!r}, SamplingParams(ignore_eos=True)).token_ids)
try:
    import jax
except ImportError:
    print("no jax")
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    ids, jax = result.stdout.splitlines()
    assert tuple(map(int, ids.split())) == answer
    assert jax == "no jax"


def test_only_light_modules_are_imported(tiny_artifact, python):
    """Imports delay the first token."""
    code = f"""
import sys
from precast.loaders.load import load
load({str(tiny_artifact)!r}).generate("the cat")
print(*sorted({{name.partition(".")[0] for name in sys.modules if sys.modules[name] is not None}}))
"""
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    heavy = {
        "jax",
        "flax",
        "transformers",
        "torch",
        "tensorflow",
        "safetensors",
        "scipy",
        "jinja2",
        "rich",
        "pydantic",
    }
    assert heavy.isdisjoint(result.stdout.split())


# --- memory -------------------------------------------------------------------------------------------------


def test_the_manifest_states_that_caches_are_aliased(tiny_artifact):
    manifest = read_manifest(tiny_artifact)
    cache = sum(array.bytes for array in manifest.cache)
    for program in manifest.targets[0].programs:
        if program.kind == "cache":
            continue
        aliases = {r.name: r.alias for r in program.results if r.role == "cache"}
        assert aliases == {array.name: array.name for array in manifest.cache}
        assert program.memory.aliased == cache
        assert program.memory.arguments >= sum(a.bytes for a in program.arguments)


def test_a_call_needs_less_memory_than_one_layer_s_cache(export_tiny):
    """The context is so long that a copy of the cache would take more memory than the activations."""
    root = export_tiny(context=128, slots=64, buckets=(8,), targets=("cpu",))
    manifest = read_manifest(root)
    layer = sum(array.bytes for array in manifest.cache) / manifest.model.layers
    model = load(root)
    for program, bound in ((p, model.engine) for p in manifest.targets[0].programs if p.kind == "decode"):
        assert program.memory.temporary < layer
        cache = bound.new_cache()
        bound.prefill(PROMPT, cache)
        before = {name: address(buffer) for name, buffer in cache.buffers.items()}
        bound.decode([DecodeRow(0, 5, 3)], cache)
        bound.prefill(PROMPT, cache, start=4)
        assert {name: address(buffer) for name, buffer in cache.buffers.items()} == before


def address(buffer) -> int:
    return pjrt.client().get(buffer).ctypes.data


def test_the_live_executables_agree_with_the_manifest(tiny_artifact):
    for program in read_manifest(tiny_artifact).targets[0].programs:
        data = (tiny_artifact / program.executable).read_bytes()
        assert pjrt.client().load(data, (), program.name).memory().temporary == program.memory.temporary


def test_weights_are_zero_copy(tiny_artifact):
    """The client aliases the mapped weights."""
    from precast.loaders.artifact.weights import map_weights

    weights = map_weights(tiny_artifact / "weights.safetensors")
    aligned = {name: array for name, array in weights.items() if array.ctypes.data % 64 == 0}
    assert sum(a.nbytes for a in aligned.values()) > 0.95 * sum(a.nbytes for a in weights.values())
    for array in aligned.values():
        assert address(pjrt.client().put(array)) == array.ctypes.data


def test_the_model_reproduces_the_golden_answers(tiny_artifact, tiny_model):
    golden = json.loads((tiny_artifact / "golden.json").read_text())["greedy"]
    assert len(golden) >= 2
    for case in golden:
        params = SamplingParams(max_tokens=16, ignore_eos=True)
        found = tiny_model.generate(case["prompt_token_ids"], params).token_ids
        assert list(found)[: len(case["token_ids"])] == case["token_ids"]
    assert any(len(case["prompt_token_ids"]) > 8 for case in golden)
    assert re.fullmatch(r"cpu-(x86-64-v2|aarch64)", tiny_model.target.name)
