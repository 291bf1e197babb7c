"""An export from start to finish: what it writes, what it refuses, and what it costs."""

import errno
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from precast.exporter import export as exporting
from precast.exporter.export import ExportOptions, Progress, _far_rope, _geometry, export
from precast.exporter.models.registry import read_model
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest import SamplingDefaults
from precast.loaders.compiling.isa import default_isa
from precast.loaders.console.inspect import render
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load
from precast.loaders.locate import read_manifest

QUICK = ExportOptions(buckets=(8,), context=32, weights="float32", targets=("cpu",))


@pytest.fixture
def refusal(tmp_path):
    """What an export that must fail says; nothing may be left of it."""

    def run(source, options=QUICK) -> str:
        with pytest.raises(PrecastError) as raised:
            export(source, tmp_path / "output" / "artifact", options)
        assert not (tmp_path / "output").exists() or os.listdir(tmp_path / "output") == []
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return run


# --- what it writes -----------------------------------------------------------------------------------------


def test_every_file_is_listed_with_its_hash(tiny_artifact):
    manifest = read_manifest(tiny_artifact)
    found = {p.relative_to(tiny_artifact).as_posix(): p for p in tiny_artifact.rglob("*") if p.is_file()}
    assert manifest.files.keys() == found.keys() - {"manifest.json"}
    for name, entry in manifest.files.items():
        data = found[name].read_bytes()
        assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_manifest_says_what_the_model_is(tiny_artifact, tiny_source):
    manifest = read_manifest(tiny_artifact)
    model = manifest.model
    assert (model.architecture, model.layers, model.width, model.heads) == ("llama", 3, 48, 4)
    assert (model.kv_heads, model.head_dim, model.ff_width, model.vocab) == (2, 12, 80, 320)
    assert model.parameters == sum(np.prod(t.shape) for t in tiny_source().tensors.values())
    assert (manifest.context, manifest.slots, manifest.buckets) == (64, 1, (8, 16))
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


def test_an_artifact_that_answers_wrongly_is_not_shipped(refusal, tiny_source, monkeypatch):
    """Here the programs are right and the reference is given other weights; it only matters that they differ."""
    original = exporting.map_weights

    def other_weights(path):
        weights = original(path)
        return weights | {"lm_head.weight": np.ascontiguousarray(weights["lm_head.weight"][:, ::-1])}

    monkeypatch.setattr(exporting, "map_weights", other_weights)
    text = refusal(tiny_source())
    assert "tiny: the compiled programs answer" in text
    assert "where the reference answers" in text


def test_only_ties_of_the_reference_are_forgiven():
    from precast.exporter.reference.golden import TIE, Case, _agreed
    from precast.loaders.artifact.golden import FirstLogits

    first = FirstLogits(token_ids=(5,), values=(1.0,), tolerance=0.1)
    case = Case(prompt=(1, 2), tokens=(5, 6, 7), first=first)
    best, sure = np.array([5, 9, 7]), np.full(3, 1.0)
    with pytest.raises(PrecastError, match="answer 6 where the reference answers 9"):
        _agreed(case, best, sure, TIE, "x")
    tied = np.array([1.0, TIE / 2, 1.0])
    assert _agreed(case, best, tied, TIE, "x") == Case(prompt=(1, 2), tokens=(5,), first=first)


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


def test_exports_of_one_day_are_the_same(export_tiny, monkeypatch):
    """All but the executables, in which XLA numbers a process's programs; test_targets has two processes."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first, second = (read_manifest(export_tiny(buckets=(8,), targets=("cpu",))) for _ in range(2))
    assert first.provenance.created == "2023-11-14"
    assert first.targets[0].stablehlo_expires == "2024-05-12"
    same = {name for name, entry in first.files.items() if second.files[name] == entry}
    assert {name for name in first.files if not name.endswith(".xla")} <= same


@pytest.mark.parametrize("epoch", ["yesterday", "1e9", "9" * 30])
def test_a_day_that_is_none_is_refused(refusal, tiny_source, monkeypatch, epoch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    assert refusal(tiny_source()).startswith("SOURCE_DATE_EPOCH: expected seconds since 1970, found ")


def test_progress_is_told(tmp_path, tiny_source):
    stages, weights, built = [], [], []
    progress = Progress(
        stage=stages.append, weights=lambda done, total: weights.append((done, total)), built=built.append
    )
    source = tiny_source()
    source = replace(source, remarks=("a line about the source",))
    export(source, tmp_path / "a", QUICK, progress)
    total = 4 * sum(int(np.prod(t.shape)) for t in source.tensors.values())
    assert weights[-1] == (total, total)
    assert [done for done, _ in weights] == sorted(done for done, _ in weights)
    assert [b.program.name for b in built] == ["cache", "prefill_8", "decode"]
    assert stages == [
        "a line about the source",
        "writing weights",
        "lowering target cpu",
        f"compiling target cpu for {default_isa()}",
        "checking answers against the reference",
    ]


def test_named_templates_come_along(tmp_path, tiny_source):
    named = {"tool_use": "<s>the {{ tools | length }} dogs", "rag": "<s>{{ messages[0].content }}"}
    manifest = export(tiny_source(fields={"named_templates": named}), tmp_path / "a", QUICK)
    assert set(manifest.tokenizer.named_templates.values()) < set(manifest.files)
    model, chat = load(tmp_path / "a"), [{"role": "user", "content": "the cat"}]

    def ids(text):
        return model.tokenizer.encode(text, add_special_tokens=False)

    assert model.chat_prompt(chat, tools=[{}, {}]) == ids("<s>the 2 dogs")
    assert model.chat_prompt(chat, template="rag") == ids("<s>the cat")
    assert model.chat_prompt(chat) == model.chat_prompt(chat, template="default") != ids("<s>the cat")


# --- options ------------------------------------------------------------------------------------------------


def test_buckets_are_by_default_those_that_fit(tmp_path, tiny_source):
    options = ExportOptions(weights="float32", targets=("cpu",))
    short = replace(options, context=40)
    assert export(tiny_source(), tmp_path / "short", short).buckets == (40,)
    assert _geometry(options, longrope(limit=600)).buckets == (64, 128, 512)
    assert _geometry(options, longrope(limit=200)).buckets == (64, 128)


def longrope(limit):
    """A model whose RoPE changes beyond 96 positions."""
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"vocab_size": 9, "max_position_embeddings": limit, "original_max_position_embeddings": 96}
    return read_model({"model_type": "phi3", **config, "rope_scaling": scaling}, "config.json")


def test_rope_that_depends_on_the_context_is_told():
    assert _far_rope(longrope(limit=600), 96) is None
    assert "other frequencies beyond 96 positions" in _far_rope(longrope(limit=600), 97)


def test_buckets_are_sorted_and_the_context_is_the_model_s(tmp_path, tiny_source):
    options = ExportOptions(buckets=(32, 1), weights="float32", targets=("cpu",))
    manifest = export(tiny_source(config={"max_position_embeddings": 40}), tmp_path / "a", options)
    assert (manifest.buckets, manifest.context) == ((1, 32), 40)


def test_a_bucket_may_fill_the_context(tmp_path, tiny_source):
    export(
        tiny_source(),
        tmp_path / "a",
        ExportOptions(buckets=(32,), context=32, weights="float32", targets=("cpu",)),
    )
    found = load(tmp_path / "a").generate([5] * 31, SamplingParams(ignore_eos=True))
    assert len(found.token_ids) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"buckets": ()}, "--buckets: expected at least one prompt length, found none."),
        ({"buckets": (0,)}, "--buckets: 0 is not possible"),
        ({"buckets": (8, 8)}, "--buckets: 8 is named twice"),
        ({"buckets": (33,), "context": 32}, "--buckets: 33 is larger than the context of 32"),
        (
            {"targets": ()},
            "targets: expected one or more of cpu, portable, cuda, savedmodel, each once, found none.",
        ),
        (
            {"targets": ("gpu",)},
            "targets: expected one or more of cpu, portable, cuda, savedmodel, each once, found 'gpu'.",
        ),
        ({"targets": ("cpu", "cpu")}, "each once, found one of them twice."),
        ({"context": 129}, "--context: 129 is not possible, expected 2 to 128"),
        ({"slots": 0}, "--slots: 0 is not possible"),
        ({"weights": "int2"}, "--weights: 'int2' is not supported"),
    ],
)
def test_options_that_are_not_possible(refusal, tiny_source, options, text):
    assert text in refusal(tiny_source(), ExportOptions(**{"buckets": (8,), "weights": "float32", **options}))


# --- sources ------------------------------------------------------------------------------------------------


def test_sources_that_do_not_fit_together(refusal, tiny_source):
    name = "model.layers.0.self_attn.k_proj.weight"
    values = np.full((24, 48), np.nan, np.float32)
    cases = [
        (
            tiny_source(config={"model_type": "rwkv"}),
            "expected model_type to be one of gemma2, gemma3_text, gpt2",
        ),
        (tiny_source(tensors={name: None}), f"tiny: tensor {name!r} is missing"),
        (
            tiny_source(tensors={name: values[1:]}),
            f"tiny: tensor {name!r} has shape [23, 48], expected [24, 48]",
        ),
        (tiny_source(tensors={"odd": values}), "tiny: tensor 'odd' belongs to no parameter of the model"),
        (tiny_source(tensors={name: values}), f"{name}: the tensor holds values that are not finite numbers"),
        (
            tiny_source(config={"vocab_size": 299}),
            "the tokenizer has ids up to 299, not counting added tokens, and the model embeds 299 tokens",
        ),
        (
            tiny_source(fields={"tokenizer_json": b"{}"}),
            "tokenizer.json: expected a tokenizer that tokenizers",
        ),
    ]
    for source, text in cases:
        assert text in refusal(source)


@pytest.mark.parametrize(
    ("sampling", "text"),
    [
        ({"temperature": 1.0, "top_k": -1}, "top_k must be an integer from 0 to 2^63 - 1, found -1; correct"),
        ({"top_k": 2.5}, "top_k must be an integer from 0 to 2^63 - 1, found 2.5; correct"),
        ({"temperature": float("nan")}, "temperature must be a finite number at least 0, found nan; correct"),
        ({"top_p": 1.5}, "top_p must be a finite number between 0 and 1, found 1.5; correct"),
        ({"min_p": "low"}, "min_p must be a finite number between 0 and 1, found 'low'; correct"),
        (
            {"temperature": 10**400},
            "temperature must be a finite number at least 0 that float32 holds, which",
        ),
        (
            {"bad_words_ids": [[]]},
            "bad_words_ids must be a list of lists of token ids, none empty, found",
        ),
        (
            {"suppress_tokens": [-1]},
            "a token id of suppress_tokens must be an integer from 0 to 2^63 - 1, found -1;",
        ),
        ({"top_k": 10**400}, "top_k must be an integer from 0 to 2^63 - 1, found 1000"),
        ({"typical_p": 0.5}, "'typical_p' is unknown, expected one of max_tokens, max_length, min_tokens"),
    ],
)
def test_sampling_defaults_that_the_loader_would_refuse(refusal, tiny_source, sampling, text):
    found = refusal(tiny_source(fields={"sampling": sampling}))
    where = "tiny: the sampling defaults in its generation_config.json or GGUF metadata cannot be used: "
    assert found.startswith(where + text)


def test_sampling_defaults_are_the_loader_s(tmp_path, tiny_source):
    source = tiny_source(fields={"sampling": {"temperature": 1, "top_k": 20}})
    assert export(source, tmp_path / "a", QUICK).sampling == SamplingDefaults(temperature=1.0, top_k=20)
    params = load(tmp_path / "a").default_sampling()
    assert (params.temperature, params.top_k) == (1.0, 20)


def test_sampling_defaults_that_are_lists(tmp_path, tiny_source):
    """They pass through the manifest's JSON, to the loader and to `inspect`."""
    said = {
        "bad_words_ids": [[5, 6], [7]],
        "suppress_tokens": [3],
        "stop": ["a"],
        "min_tokens": 4,
        "max_length": 9,
    }
    export(tiny_source(fields={"sampling": said}), tmp_path / "a", QUICK)
    params = load(tmp_path / "a").default_sampling()
    assert params == SamplingParams(**said)
    assert (params.bad_words_ids, params.stop) == (((5, 6), (7,)), ("a",))
    shown = render(tmp_path / "a", as_json=False)
    assert (
        "  sampling max_length 9, min_tokens 4, suppress_tokens (1), bad_words_ids (2), stop 'a'\n" in shown
    )


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages", "{% for m in messages %}", "{% nonsense %}"])
def test_a_chat_template_that_does_not_compile(refusal, tiny_source, template):
    text = refusal(tiny_source(fields={"chat_template": template}))
    assert text.startswith("tiny: its chat template is unusable (The chat template failed at line 1: ")
    assert text.endswith("); correct or remove it there.")


def test_what_is_left_out_is_told(tmp_path, tiny_source):
    stages = []
    progress = Progress(stage=stages.append, weights=lambda *_: None, built=lambda _: None)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    export(tiny_source(tensors={name: np.ones(6, np.float32)}), tmp_path / "a", QUICK, progress)
    assert stages[:2] == [f"leaving out {name}", "writing weights"]


def test_it_compiles_for_the_cpu_and_checks_in_full_precision(tmp_path, tiny_source, monkeypatch):
    """As on a machine where JAX computes elsewhere, and less precisely, by default."""
    import jax

    seen, original, record = [], exporting.build_targets, exporting._record_golden

    def build(*arguments):
        seen.append(jax.config.jax_default_device)
        return original(*arguments)

    def check(*arguments):
        seen.append((jax.config.jax_default_device, jax.config.jax_default_matmul_precision))
        record(*arguments)

    monkeypatch.setattr(exporting, "build_targets", build)
    monkeypatch.setattr(exporting, "_record_golden", check)
    export(tiny_source(), tmp_path / "a", QUICK)
    cpu = jax.devices("cpu")[0]
    assert seen == [cpu, (cpu, "highest")]


def test_jax_without_a_cpu(refusal, tiny_source, monkeypatch):
    import jax

    def devices(platform=None):
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr(jax, "devices", devices)
    assert refusal(tiny_source()).endswith("add cpu to JAX_PLATFORMS or unset it.")


WIDE = """
import sys
from pathlib import Path
from precast.exporter.export import ExportOptions, export
from precast.exporter.sources.open import open_source

options = ExportOptions(buckets=(8,), context=32, weights="float32")
manifest = export(open_source(sys.argv[1]), Path(sys.argv[2]), options)
print(sorted({v.dtype for t in manifest.targets for p in t.programs for v in (*p.arguments, *p.results)}))
"""


def test_wide_numbers_of_jax_change_nothing(python, tmp_path, tiny_checkpoint):
    result = python("-c", WIDE, str(tiny_checkpoint()), str(tmp_path / "a"), env={"JAX_ENABLE_X64": "1"})
    assert result.returncode == 0, result.stderr
    assert result.stdout == "['float32', 'int32']\n"


def test_a_source_that_cannot_be_read_any_more(refusal, tiny_source):
    """The disk that the checkpoint lies on fails in the middle."""
    from precast.exporter.sources.base import SourceTensor

    def fail():
        raise OSError(errno.EIO, "Input/output error")

    source = tiny_source()
    tensors = dict(source.tensors)
    name = "model.norm.weight"
    tensors[name] = SourceTensor(shape=tensors[name].shape, dtype="float32", read=fail)
    assert "Input/output error" in refusal(tiny_source(fields={"tensors": tensors}))


@pytest.mark.parametrize("method", ["write_bytes", "write_text"])
def test_a_disk_that_fills_up_at_any_file(refusal, tiny_source, monkeypatch, method):
    """Every file that is written whole fails once, the mark of the temporary folder first."""
    original, seen = getattr(Path, method), []
    stopped = "writing stopped (No space left on device); nothing was left behind"
    begun = ["cannot write there (No space left on device)"] if method == "write_bytes" else []

    for place, sentence in enumerate([*begun, *[stopped] * (4 if method == "write_bytes" else 2)]):
        seen.clear()

        def write(path, *arguments, place=place, **options):
            seen.append(path.name)
            if len(seen) > place:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(path, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, method, write)
            assert sentence in refusal(tiny_source())
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
from precast.exporter.export import ExportOptions, export
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
    """Peak resident memory, mapped pages of the finished file included, over that of a tiny model's export."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc")
    (tmp_path / "tokenizer.json").write_bytes(tiny_source().tokenizer_json)

    def peak(name: str, *sizes: int) -> list[int]:
        result = python("-c", PEAK, str(tmp_path / "tokenizer.json"), str(tmp_path / name), *map(str, sizes))
        assert result.returncode == 0, result.stderr
        return list(map(int, result.stdout.split()))

    baseline, _, _ = peak("small", 320, 64, 2, 96)
    most, weights, largest = peak("large", 20_000, 512, 12, 1408)
    assert weights > 180e6
    assert most < baseline + 2 * weights + largest
