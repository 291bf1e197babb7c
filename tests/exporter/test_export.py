"""An export from start to finish: its files, its failures, and its memory."""

import errno
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from precast.exporter import export as pipeline
from precast.exporter.export import export
from precast.exporter.options import ExportOptions
from precast.exporter.reference import golden, recording
from precast.exporter.targets.built import BuiltProgram
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.golden import FirstLogits
from precast.loaders.compiling.isa import default_isa
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load
from precast.loaders.locate import read_manifest

QUICK = ExportOptions(buckets=(8,), context=32, weights="float32", targets=("cpu",))


def test_every_file_is_listed_with_its_hash(tiny_artifact):
    manifest = read_manifest(tiny_artifact)
    found = {p.relative_to(tiny_artifact).as_posix(): p for p in tiny_artifact.rglob("*") if p.is_file()}
    assert manifest.files.keys() == found.keys() - {"manifest.json"}
    for name, entry in manifest.files.items():
        data = found[name].read_bytes()
        assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_manifest_describes_the_model(tiny_artifact, tiny_source):
    manifest = read_manifest(tiny_artifact)
    model = manifest.model
    assert (model.architecture, model.layers, model.width, model.heads) == ("llama", 3, 48, 4)
    assert (model.kv_heads, model.head_dim, model.ff_width, model.vocab) == (2, 12, 80, 320)
    assert model.parameters == sum(np.prod(t.shape) for t in tiny_source().tensors.values())
    assert (manifest.context, manifest.slots, manifest.buckets) == (64, 8, (8, 16))
    assert manifest.tokenizer.eos_token_ids == (1,)
    assert manifest.provenance.licence == "Apache-2.0"
    assert {"jax", "jaxlib", "numpy", "python"} <= manifest.provenance.versions.keys()


def test_the_golden_answers_are_replayed(tiny_artifact, tiny_model, reference):
    cases = json.loads((tiny_artifact / "golden.json").read_text())["greedy"]
    assert sum(len(case["token_ids"]) for case in cases) > 20
    for case in cases:
        prompt, expected = case["prompt_token_ids"], case["token_ids"]
        params = SamplingParams(max_tokens=max(1, len(expected)), ignore_eos=True)
        assert list(tiny_model.generate(prompt, params).token_ids)[: len(expected)] == expected
        assert reference([*prompt, *expected]).argmax(-1)[len(prompt) - 1 : -1].tolist() == expected


def test_an_artifact_with_wrong_answers_is_not_shipped(export_refusal, tiny_source, monkeypatch):
    """In this test, the reference gets other weights, so the answers of correct programs differ from its answers."""
    original = recording.map_weights

    def other_weights(path):
        weights = original(path)
        return weights | {"lm_head.weight": np.ascontiguousarray(weights["lm_head.weight"][:, ::-1])}

    monkeypatch.setattr(recording, "map_weights", other_weights)
    text = export_refusal(tiny_source())
    assert "tiny: the compiled programs answer" in text
    assert "where the reference answers" in text


def test_only_ties_of_the_reference_are_forgiven():
    first = FirstLogits(token_ids=(5,), values=(1.0,), tolerance=0.1)
    case = golden.Case(prompt=(1, 2), tokens=(5, 6, 7), first=first)
    best, sure = np.array([5, 9, 7]), np.full(3, 1.0)
    with pytest.raises(PrecastError, match="answer with token 6 where the reference answers with token 9"):
        golden._check_case(case, best, sure, golden.TIE, "x")
    tied = np.array([1.0, golden.TIE / 2, 1.0])
    shortened = golden.Case(prompt=(1, 2), tokens=(5,), first=first)
    assert golden._check_case(case, best, tied, golden.TIE, "x") == shortened


def test_tied_embeddings_are_stored_once(tmp_path, tiny_source):
    source = tiny_source(config={"tie_word_embeddings": True})
    manifest = export(source, tmp_path / "a", QUICK)
    names = {a.name for a in manifest.targets[0].programs[-1].arguments if a.role == "weight"}
    assert "model.embed_tokens.weight" in names
    assert not any(name.startswith("lm_head") for name in names)
    assert manifest.model.parameters == sum(np.prod(t.shape) for t in source.tensors.values())


def test_a_source_without_template_licence_or_special_tokens(tmp_path, tiny_source):
    bare = {"chat_template": None, "licence": None, "bos_token": None, "eos_token": None, "eos_token_ids": ()}
    manifest = export(tiny_source(fields=bare), tmp_path / "a", QUICK)
    assert manifest.tokenizer.chat_template is None
    assert not (tmp_path / "a" / "chat_template.jinja").exists()
    model = load(tmp_path / "a")
    assert model.generate("the cat").finish_reason == "length"
    with pytest.raises(PrecastError, match="no chat template"):
        model.chat([{"role": "user", "content": "x"}])


def test_exports_of_one_day_are_equal(export_tiny, monkeypatch):
    """All files except executables are equal.

    Executables may differ, because XLA numbers the programs of a process. test_targets compares the executables of two
    processes.
    """
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first, second = (read_manifest(export_tiny(buckets=(8,), targets=("cpu",))) for _ in range(2))
    assert first.provenance.created == "2023-11-14"
    assert first.targets[0].stablehlo_expires == "2024-05-12"
    same = {name for name, entry in first.files.items() if second.files[name] == entry}
    assert {name for name in first.files if not name.endswith(".xla")} <= same


def test_an_export_reports_its_progress(tmp_path, tiny_source):
    lines, steps = [], []
    source = replace(tiny_source(), remarks=("a line about the source",))
    export(source, tmp_path / "a", QUICK, log=lines.append, progress=steps.append)
    weights = [step for step in steps if step.text == "writing weights"]
    total = 4 * sum(int(np.prod(t.shape)) for t in source.tensors.values())
    assert {(step.total, step.unit) for step in weights} == {(total, "bytes")}
    assert weights[-1].done == total
    assert [step.done for step in weights] == sorted(step.done for step in weights)
    built = [step for step in steps if isinstance(step, BuiltProgram)]
    assert [b.program.name for b in built] == ["cache", "prefill_8", "decode", "score"]
    assert lines == [
        "a line about the source",
        "writing weights",
        "lowering target cpu",
        f"compiling target cpu for {default_isa()}",
        "checking answers against the reference",
    ]


def test_measuring_fidelity_reports_its_progress(tmp_path, tiny_source):
    steps = []
    export(tiny_source(), tmp_path / "a", replace(QUICK, weights="int8"), progress=steps.append)
    scored = [step for step in steps if step.unit == "predictions"]
    assert [step.done for step in scored] == list(range(scored[-1].total + 1))


def test_named_templates_are_exported(tmp_path, tiny_source):
    named = {"tool_use": "<s>the {{ tools | length }} dogs", "rag": "<s>{{ messages[0].content }}"}
    manifest = export(tiny_source(fields={"named_templates": named}), tmp_path / "a", QUICK)
    assert set(manifest.tokenizer.named_templates.values()) < set(manifest.files)
    model, chat = load(tmp_path / "a"), [{"role": "user", "content": "the cat"}]

    def ids(text):
        return model.tokenizer.encode(text, add_special_tokens=False)

    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    assert model.chat_prompt(chat, tools=tools) == ids("<s>the 2 dogs")
    assert model.chat_prompt(chat, template="rag") == ids("<s>the cat")
    assert model.chat_prompt(chat) == model.chat_prompt(chat, template="default") != ids("<s>the cat")


# --- devices, disks and sources that fail -------------------------------------------------------------------


def test_it_compiles_for_the_cpu_and_checks_in_full_precision(tmp_path, tiny_source, monkeypatch):
    """JAX's default device may be another, and its default precision lower; neither must have an effect."""
    import jax

    seen, build, check = [], pipeline.build_targets, golden.check

    def build_targets(*arguments):
        seen.append(jax.config.jax_default_device)
        return build(*arguments)

    def check_golden(*arguments):
        seen.append((jax.config.jax_default_device, jax.config.jax_default_matmul_precision))
        return check(*arguments)

    monkeypatch.setattr(pipeline, "build_targets", build_targets)
    monkeypatch.setattr(golden, "check", check_golden)
    export(tiny_source(), tmp_path / "a", QUICK)
    cpu = jax.devices("cpu")[0]
    assert seen == [cpu, (cpu, "highest")]


def test_jax_without_the_cpu_is_refused(export_refusal, tiny_source, monkeypatch):
    import jax

    def devices(platform=None):
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr(jax, "devices", devices)
    assert export_refusal(tiny_source()) == (
        "the export needs JAX's CPU backend, which JAX_PLATFORMS excludes; add cpu to that variable, or unset it."
    )


WIDE = """
import sys
from pathlib import Path
from precast.exporter.export import export
from precast.exporter.options import ExportOptions
from precast.exporter.sources.open import open_source

options = ExportOptions(buckets=(8,), context=32, weights="float32")
manifest = export(open_source(sys.argv[1]), Path(sys.argv[2]), options)
print(sorted({v.dtype for t in manifest.targets for p in t.programs for v in (*p.arguments, *p.results)}))
"""


def test_64_bit_types_of_jax_change_nothing(python, tmp_path, tiny_checkpoint):
    result = python("-c", WIDE, str(tiny_checkpoint()), str(tmp_path / "a"), env={"JAX_ENABLE_X64": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout == "['float32', 'int32']\n"


def test_a_read_error_of_the_source_is_reported(export_refusal, tiny_source):
    """The checkpoint's disk fails during the export."""
    from precast.exporter.sources.base import SourceTensor

    def fail():
        raise OSError(errno.EIO, "Input/output error")

    source = tiny_source()
    tensors = dict(source.tensors)
    name = "model.norm.weight"
    tensors[name] = SourceTensor(shape=tensors[name].shape, dtype="float32", read=fail)
    assert "Input/output error" in export_refusal(tiny_source(fields={"tensors": tensors}))


@pytest.mark.parametrize("method", ["write_bytes", "write_text"])
def test_a_full_disk_at_any_file_leaves_nothing(export_refusal, tiny_source, monkeypatch, method):
    """Let each write of a file fail in turn. The first write is the marker of the temporary folder."""
    original, seen = getattr(Path, method), []
    stopped = (
        "writing stopped (No space left on device), and the unfinished folder was removed; free some space"
    )
    begun = ["cannot be created (No space left on device)"] if method == "write_bytes" else []

    for place, sentence in enumerate([*begun, *[stopped] * (4 if method == "write_bytes" else 2)]):
        seen.clear()

        def write(path, *arguments, place=place, **options):
            seen.append(path.name)
            if len(seen) > place:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(path, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, method, write)
            assert sentence in export_refusal(tiny_source())
        assert len(seen) == place + 1


# --- cost ---------------------------------------------------------------------------------------------------


def test_programs_do_not_grow_with_depth(depths):
    shallow, deep = (read_manifest(depths[n]) for n in (2, 12))
    for one, other in zip(shallow.targets[0].programs, deep.targets[0].programs, strict=True):
        assert one.name == other.name
        assert len(one.arguments) == len(other.arguments) < 25
        for kind in ("executable", "stablehlo"):
            sizes = [m.files[getattr(one, kind)].bytes for m in (shallow, deep)]
            assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
            assert sizes[1] < 200_000


PEAK = """
import sys
from pathlib import Path
import numpy as np
from precast.exporter.export import export
from precast.exporter.options import ExportOptions
from precast.exporter.sources.base import Source, SourceTensor

vocab, width, layers, ff = map(int, sys.argv[3:])
config = {
    "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": ff, "vocab_size": vocab, "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
kv = width // 2
layer = {
    "input_layernorm": (width,), "post_attention_layernorm": (width,), "self_attn.q_proj": (width, width),
    "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width), "self_attn.o_proj": (width, width),
    "mlp.gate_proj": (ff, width), "mlp.up_proj": (ff, width), "mlp.down_proj": (width, ff),
}
shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
for i in range(layers):
    shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}

def tensor(shape):
    def read():
        values = np.random.default_rng(sum(shape)).random(shape, np.float32)
        values *= shape[-1] ** -0.5
        return values
    return SourceTensor(shape=shape, dtype="float32", read=read)

source = Source(
    name="big", config=config, tensors={name: tensor(shape) for name, shape in shapes.items()},
    tokenizer_json=Path(sys.argv[1]).read_bytes(), chat_template=None, bos_token=None, eos_token=None,
    eos_token_ids=(), sampling={}, licence=None, files=(),
)
export(source, Path(sys.argv[2]), ExportOptions(buckets=(8,), context=64, weights="float32", targets=("cpu",)))
status = Path("/proc/self/status").read_text()
peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
print(peak, 4 * sum(int(np.prod(s)) for s in shapes.values()), 4 * max(int(np.prod(s)) for s in shapes.values()))
"""


def test_the_weights_are_never_in_memory_twice(python, tmp_path, tiny_source):
    """Compare the peak of resident memory, which includes mapped pages, with that of a tiny model's export."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of memory is read from /proc")
    (tmp_path / "tokenizer.json").write_bytes(tiny_source().tokenizer_json)

    def peak(name: str, *sizes: int) -> list[int]:
        result = python("-c", PEAK, str(tmp_path / "tokenizer.json"), str(tmp_path / name), *map(str, sizes))
        assert result.returncode == 0, result.stderr
        return list(map(int, result.stdout.split()))

    baseline, _, _ = peak("small", 320, 64, 2, 96)
    most, weights, largest = peak("large", 20_000, 512, 12, 1408)
    assert weights > 180e6
    assert most < baseline + 2 * weights + largest
