"""Checks of a source before the export writes: refusals, remarks, and sampling defaults."""

from dataclasses import replace

import numpy as np
import pytest

from precast.exporter.export import export
from precast.exporter.options import ExportOptions
from precast.exporter.plan import make_plan
from precast.loaders.artifact.manifest import SamplingDefaults
from precast.loaders.console.inspect import render
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load
from precast.loaders.runtime import resources

QUICK = ExportOptions(buckets=(8,), context=32, weights="float32", targets=("cpu",))


def test_sources_that_do_not_fit_together(export_refusal, tiny_source):
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
            f"tiny: tensor {name!r} has shape [23, 48], but the config requires [24, 48]",
        ),
        (tiny_source(tensors={"odd": values}), "tiny: tensor 'odd' belongs to no parameter of the model"),
        (
            tiny_source(tensors={name: values}),
            f"{name}: the tensor contains values that are not finite numbers",
        ),
        (
            tiny_source(config={"vocab_size": 299}),
            "the tokenizer has ids up to 299, not counting added tokens, but the model embeds only 299 tokens",
        ),
        (
            tiny_source(fields={"tokenizer_json": b"{}"}),
            "tokenizer.json: expected a tokenizer that tokenizers",
        ),
    ]
    for source, text in cases:
        assert text in export_refusal(source)


@pytest.mark.parametrize(
    ("sampling", "text"),
    [
        ({"temperature": 1.0, "top_k": -1}, "top_k must be an integer from 0 to 2^63 - 1, found -1; correct"),
        ({"top_k": 2.5}, "top_k must be an integer from 0 to 2^63 - 1, found 2.5; correct"),
        (
            {"temperature": float("nan")},
            "temperature must be a finite number of at least 0, found nan; correct",
        ),
        ({"top_p": 1.5}, "top_p must be a finite number between 0 and 1, found 1.5; correct"),
        ({"min_p": "low"}, "min_p must be a finite number between 0 and 1, found 'low'; correct"),
        (
            {"temperature": 10**400},
            "temperature must be a finite number of at least 0 that float32 can represent",
        ),
        (
            {"bad_words_ids": [[]]},
            "bad_words_ids must be a list of non-empty lists of token ids, found [[]]; correct or remove that key.",
        ),
        (
            {"suppress_tokens": [-1]},
            "a token id of suppress_tokens must be an integer from 0 to 2^63 - 1, found -1;",
        ),
        ({"top_k": 10**400}, "top_k must be an integer from 0 to 2^63 - 1, found 1000"),
        ({"typical_p": 0.5}, "expected one of max_tokens, max_length, min_tokens"),
    ],
)
def test_invalid_sampling_defaults_are_refused(export_refusal, tiny_source, sampling, text):
    found = export_refusal(tiny_source(fields={"sampling": sampling}))
    where = "tiny: the sampling defaults in its generation_config.json or GGUF metadata cannot be used: "
    assert found.startswith(where + text)


def test_sampling_defaults_get_the_loader_s_types(tmp_path, tiny_source):
    source = tiny_source(fields={"sampling": {"temperature": 1, "top_k": 20}})
    assert export(source, tmp_path / "a", QUICK).sampling == SamplingDefaults(temperature=1.0, top_k=20)
    params = load(tmp_path / "a").default_sampling()
    assert (params.temperature, params.top_k) == (1.0, 20)


def test_lists_in_sampling_defaults(tmp_path, tiny_source):
    """Lists reach the loader and `inspect` through the manifest's JSON."""
    sampling = {
        "bad_words_ids": [[5, 6], [7]],
        "suppress_tokens": [3],
        "stop": ["a"],
        "min_tokens": 4,
        "max_length": 9,
    }
    export(tiny_source(fields={"sampling": sampling}), tmp_path / "a", QUICK)
    params = load(tmp_path / "a").default_sampling()
    assert params == SamplingParams(**sampling)
    assert (params.bad_words_ids, params.stop) == (((5, 6), (7,)), ("a",))
    shown = render(tmp_path / "a", as_json=False)
    assert (
        "  sampling max_length 9, min_tokens 4, suppress_tokens (1), bad_words_ids (2), stop 'a'\n" in shown
    )


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages", "{% for m in messages %}", "{% nonsense %}"])
def test_a_chat_template_that_does_not_compile_is_refused(export_refusal, tiny_source, template):
    text = export_refusal(tiny_source(fields={"chat_template": template}))
    assert text.startswith("tiny: its chat template is unusable (The chat template failed at line 1: ")
    assert text.endswith("); correct or remove the template.")


def test_ignored_tensors_get_a_remark(tmp_path, tiny_source):
    lines = []
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    export(tiny_source(tensors={name: np.ones(6, np.float32)}), tmp_path / "a", QUICK, log=lines.append)
    assert lines[:2] == [f"leaving out {name}", "writing weights"]


@pytest.mark.parametrize("epoch", ["yesterday", "1e9", "9" * 30])
def test_an_invalid_source_date_epoch_is_refused(export_refusal, tiny_source, monkeypatch, epoch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    assert export_refusal(tiny_source()).startswith("SOURCE_DATE_EPOCH: expected seconds since 1970, found ")


LONG = 2**31 - 1


def limit_machine(monkeypatch, **found):
    monkeypatch.setattr(
        resources, "limits", lambda _: resources.Limits(**{"address_space": None, "threads": None, **found})
    )
    monkeypatch.setattr(resources, "memory", lambda: resources.Memory(limit=1 << 30, available=0))


def test_a_cache_larger_than_memory_is_no_obstacle(monkeypatch, tiny_source):
    limit_machine(monkeypatch)
    source = tiny_source(config={"max_position_embeddings": LONG})
    plan = make_plan(source, replace(QUICK, context=4_000_000, slots=8))
    assert (plan.geometry.context, plan.geometry.slots) == (4_000_000, 8)


@pytest.mark.parametrize(
    ("context", "found", "text"),
    [
        (
            LONG,
            {},
            (
                "--context: the RoPE tables of 2147483647 positions need 206.2 GB of memory, but this machine or"
                " container has 1.1 GB; choose a shorter context."
            ),
        ),
        (
            4_000_000,
            {"allocation": 10**9},
            (
                "tiny: with a context of 4000000, an array of its KV cache takes 9.2 GB of address space, but this"
                " system allocates at most 1.0 GB at once; set vm.overcommit_memory to 1, or export with fewer --slots"
                " or a shorter --context."
            ),
        ),
        (
            4_000_000,
            {"address_space": 4 * 10**9},
            (
                "tiny: with a context of 4000000, it needs 18.4 GB of address space, but this process may take only"
                " 4.0 GB more (ulimit -v); raise that limit, or export with fewer --slots."
            ),
        ),
    ],
)
def test_a_context_that_this_machine_cannot_allocate(
    monkeypatch, export_refusal, tiny_source, context, found, text
):
    limit_machine(monkeypatch, **found)
    source = tiny_source(config={"max_position_embeddings": LONG})
    assert export_refusal(source, replace(QUICK, context=context, slots=8)) == text


def test_the_memory_of_this_machine_does_not_limit_other_devices(monkeypatch, tiny_source):
    from precast.exporter import plan

    limit_machine(monkeypatch, allocation=10**9)
    kind = replace(plan.TARGET_KINDS["cuda"], device=lambda: None)
    monkeypatch.setitem(plan.TARGET_KINDS, "cuda", kind)
    source = tiny_source(config={"max_position_embeddings": LONG})
    make_plan(source, replace(QUICK, context=4_000_000, slots=8, targets=("cuda",)))
