"""The demo model, exported with the defaults, compared with transformers and torch in float32.

``tests/reference/make_reference.py`` recorded the answers of transformers. If torch is installed, some of them are
computed again. In every recorded step, the largest logit leads clearly, so all tokens must be equal.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from precast.exporter.export import export
from precast.exporter.models.parameters import abstract_model
from precast.exporter.models.registry import read_model
from precast.exporter.options import DEFAULT_BUCKETS, ExportOptions
from precast.exporter.programs import TABLES
from precast.exporter.sources.base import Source
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.weights import map_weights
from precast.loaders.generation.model import Model
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load

REFERENCE = Path(__file__).parent / "reference"
RECORD = json.loads((REFERENCE / "demo.json").read_text(encoding="utf-8"))
CASES: list[dict[str, Any]] = RECORD["cases"]
BUCKETS = DEFAULT_BUCKETS
MARGIN = 1e-3


def _label(case: dict[str, Any]) -> str:
    return f"{len(case['prompt_token_ids'])}-{'chat' if 'messages' in case else 'text' if 'text' in case else 'ids'}"


LABELS = [_label(case) for case in CASES]


@pytest.fixture(scope="session")
def demo_source() -> Source:
    try:
        return open_source(None)
    except PrecastError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def demo_artifact(demo_source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the shared artifact of the demo model, with default buckets and context."""
    output = tmp_path_factory.mktemp("demo") / "artifact"
    export(demo_source, output, ExportOptions(weights="float32", targets=("cpu",)))
    return output


@pytest.fixture(scope="session")
def demo_model(demo_artifact: Path) -> Model:
    return load(demo_artifact)


def test_the_reference_covers_every_kind_of_prompt() -> None:
    lengths = [len(case["prompt_token_ids"]) for case in CASES]
    assert len(CASES) >= 20
    assert {1, 1000} | {bucket + d for bucket in BUCKETS for d in (-1, 0, 1)} <= set(lengths)
    assert sum(length > max(BUCKETS) for length in lengths) >= 3
    assert sum("messages" in case for case in CASES) >= 2
    assert {len(case["token_ids"]) for case in CASES} == {24}
    assert min(case["margin"] for case in CASES) > MARGIN


def test_the_reference_is_of_this_model(demo_source: Source) -> None:
    assert RECORD["sha256"] in {file.sha256 for file in demo_source.files}


@pytest.mark.parametrize("case", CASES, ids=LABELS)
def test_greedy_tokens_are_those_of_transformers(demo_model: Model, case: dict[str, Any]) -> None:
    params = SamplingParams(max_tokens=len(case["token_ids"]), ignore_eos=True)
    completion = demo_model.generate(case["prompt_token_ids"], params)
    assert list(completion.token_ids) == case["token_ids"]


def test_texts_and_chats_become_the_same_tokens(demo_model: Model) -> None:
    for case in CASES:
        if "text" in case:
            assert demo_model.tokenizer.encode(case["text"]) == case["prompt_token_ids"], case["text"]
        if "messages" in case:
            assert demo_model.chat_prompt(case["messages"]) == case["prompt_token_ids"]


def test_the_uncached_pass_chooses_the_same_tokens(demo_source: Source, demo_artifact: Path) -> None:
    """At every position of an answer, the recorded token has the largest logit."""
    chosen = [c for c in CASES if len(c["prompt_token_ids"]) in (1, 64, 129) or "messages" in c]
    assert len(chosen) >= 5
    best = _uncached_best(
        demo_source, demo_artifact, [c["prompt_token_ids"] + c["token_ids"] for c in chosen]
    )
    for case, row in zip(chosen, best, strict=True):
        first = len(case["prompt_token_ids"]) - 1
        assert row[first : first + len(case["token_ids"])].tolist() == case["token_ids"]


def _uncached_best(source: Source, artifact: Path, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Run the Flax forward pass; return for each sequence the best token after each position ``[T]``."""
    import jax
    import jax.numpy as jnp

    spec = read_model(source.config, source.name)
    model = abstract_model(spec)
    arrays = map_weights(artifact / "weights.safetensors")
    constants = [jnp.from_dlpack(arrays[name]) for name in (*TABLES, *(p.name for p in model.parameters))]

    @jax.jit
    def forward(tokens: Any, cos: Any, sin: Any, *weights: Any) -> Any:
        return jnp.argmax(model.bind(weights).forward(tokens[None], cos, sin)[0], axis=-1)

    # Pad all sequences to one length, so that the pass compiles once. No position attends to the padding.
    length = max(map(len, sequences))
    padded = [np.array([*s, *[0] * (length - len(s))], np.int32) for s in sequences]
    return [np.asarray(forward(tokens, *constants)) for tokens in padded]


# --- with torch ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(torch: Any, import_reference_script: Callable[[str], Any]) -> Any:
    """Return the script that writes the reference, or skip if it cannot run."""
    pytest.importorskip("accelerate", reason="the live comparison needs accelerate")
    return import_reference_script("make_reference")


@pytest.fixture(scope="module")
def transformers_model(script: Any, demo_source: Source) -> Any:
    return script.load_demo_reference()


def test_tensors_are_those_of_transformers(transformers_model: Any, demo_source: Source) -> None:
    """Both readers undo the file's permutation of the rows of q and k."""
    state = transformers_model.state_dict()
    assert set(state) - set(demo_source.tensors) == {"lm_head.weight"}  # tied
    for name, tensor in demo_source.tensors.items():
        assert np.array_equal(tensor.read(), state[name].numpy()), name


def test_the_reference_is_up_to_date(script: Any, transformers_model: Any) -> None:
    """Compare the first tokens of three answers; ``make_reference.py --check`` compares all answers."""
    chosen = [next(c for c in CASES if len(c["prompt_token_ids"]) == n) for n in (1, 65)]
    chosen.append(next(c for c in CASES if "messages" in c))
    beginnings = [{**case, "token_ids": case["token_ids"][:8]} for case in chosen]
    assert script.demo_differences(transformers_model, beginnings) == []
