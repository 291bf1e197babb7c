"""Shared fixtures: a tiny model with a real tokenizer, exported once, and ways to break its artifact.

Shared artifacts are read-only by convention; `artifact_copy` is for tests that write.
"""

import dataclasses
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent

# The vocabulary is larger than the tokenizer's, as in padded models. Heads of 12 fill no vector register.
TINY_CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 80,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = ["the quick brown fox jumps over the lazy dog", "def fibonacci(n): return n", "the cat sat on the mat"]


@pytest.fixture(scope="session", autouse=True)
def tests_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give the tests a cache folder of their own, with the user's demo model and Gemma if they have been fetched."""
    from precast.loaders.artifact.cache_folder import cache_folder

    folder, own = tmp_path_factory.mktemp("cache"), cache_folder()
    if (own / "demo").is_dir():
        (folder / "demo").symlink_to((own / "demo").resolve())
    # The benchmarks keep the file there.
    gemma = own / "bench" / "frontier" / "gemma3-270m.gguf"
    if gemma.is_file():
        (folder / gemma.name).symlink_to(gemma.resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRECAST_CACHE", str(folder))
        patch.delenv("PRECAST_REQUIRE_SIGNATURE", raising=False)
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder for one test."""
    monkeypatch.setenv("PRECAST_CACHE", str(tmp_path / "own-cache"))
    return tmp_path / "own-cache"


# --- optional packages ------------------------------------------------------------------------------------------

# Fixtures that skip a test if their packages are missing. `pytest -m extra` runs the tests that use one.
EXTRA_FIXTURES = frozenset({"torch", "savedmodel_packages"})


def pytest_configure() -> None:
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if not EXTRA_FIXTURES.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker("extra")


@pytest.fixture(scope="session")
def torch() -> Any:
    """Return torch, for a live comparison with transformers."""
    pytest.importorskip("transformers", reason="the live comparison needs transformers")
    return pytest.importorskip("torch", reason="the live comparison needs torch")


@pytest.fixture
def one_thread(torch: Any) -> Iterator[Any]:
    """Return torch limited to one thread: on such small matrices more threads are slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def savedmodel_packages() -> None:
    """Skip the test if a SavedModel cannot be exported."""
    pytest.importorskip("tensorflow", reason="a SavedModel needs TensorFlow")
    pytest.importorskip("orbax.export", reason="a SavedModel needs orbax-export")


@pytest.fixture(scope="session")
def import_reference_script() -> Callable[[str], Any]:
    """Import a script of `tests/reference` by its name without ".py"."""

    def import_script(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "reference" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return import_script


# --- the model ----------------------------------------------------------------------------------------------


def _tokenizer_json() -> bytes:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(alphabet), special_tokens=specials, show_progress=False
    )
    library.train_from_iterator(TEXT, trainer)
    return library.to_str().encode()


def _tensors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return random weights by checkpoint name, strong enough for answers to depend on every token of the prompt."""
    d, f = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[k] * config["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    layer = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    return {name: _random(place, name, shape) for place, (name, shape) in enumerate(shapes.items())}


def _random(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    if len(shape) == 1:
        return 1 + values / 10
    return values if "embed" in name else values * np.float32(1.5 * shape[1] ** -0.5)


@pytest.fixture(scope="session")
def tiny_source() -> Callable[..., Any]:
    """Return a function that makes a `Source` in memory.

    `config` replaces keys of the config, which shapes the weights; `tensors` replaces weights; `fields` replaces
    fields of the source. A value of None in `config` or `tensors` drops the key.
    """
    from precast.exporter.sources.base import Source, SourceTensor

    tokenizer = _tokenizer_json()

    def make(
        *,
        config: Mapping[str, Any] | None = None,
        tensors: Mapping[str, np.ndarray | None] | None = None,
        fields: Mapping[str, Any] | None = None,
    ) -> Source:
        merged = {k: v for k, v in {**TINY_CONFIG, **(config or {})}.items() if v is not None}
        arrays = _tensors({**TINY_CONFIG, **merged}) | dict(tensors or {})
        source = Source(
            name="tiny",
            config=merged,
            tensors={
                name: SourceTensor(shape=array.shape, dtype="float32", read=array.copy)
                for name, array in arrays.items()
                if array is not None
            },
            tokenizer_json=tokenizer,
            chat_template=TEMPLATE,
            bos_token="<s>",
            eos_token="</s>",
            eos_token_ids=(1,),
            sampling={},
            licence="Apache-2.0",
            files=(),
        )
        return dataclasses.replace(source, **(fields or {}))

    return make


@pytest.fixture
def tiny_checkpoint(tmp_path: Path, tiny_source: Callable[..., Any]) -> Callable[..., Path]:
    """Return a function that writes the tiny source as a Hugging Face directory; arguments as for `tiny_source`."""

    def write(
        *, config: Mapping[str, Any] | None = None, tensors: Mapping[str, np.ndarray | None] | None = None
    ) -> Path:
        from safetensors.numpy import save_file

        source = tiny_source(config=config, tensors=tensors)
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        save_file({name: t.read() for name, t in source.tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(source.config))
        (folder / "tokenizer.json").write_bytes(source.tokenizer_json)
        (folder / "chat_template.jinja").write_text(source.chat_template)
        return folder

    return write


# --- artifacts ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def export_tiny(
    tmp_path_factory: pytest.TempPathFactory, tiny_source: Callable[..., Any]
) -> Callable[..., Path]:
    """Return a function that exports a source, by default the tiny one, with the given export options."""
    from precast.exporter.export import export
    from precast.exporter.options import ExportOptions

    def make(source: Any = None, **options: Any) -> Path:
        output = tmp_path_factory.mktemp("exported") / "tiny"
        chosen = ExportOptions(**{"buckets": (8, 16), "context": 64, "weights": "float32", **options})
        export(tiny_source() if source is None else source, output, chosen)
        return output

    return make


@pytest.fixture(scope="session")
def tiny_artifact(export_tiny: Callable[..., Path]) -> Path:
    """Return the shared artifact of the tiny model, with buckets 8 and 16 and context 64."""
    return export_tiny()


@pytest.fixture(scope="session")
def slots_artifact(export_tiny: Callable[..., Path]) -> Path:
    """Return the shared artifact with three slots."""
    return export_tiny(slots=3, targets=("cpu",))


@pytest.fixture(scope="session")
def depths(export_tiny: Callable[..., Path], tiny_source: Callable[..., Any]) -> Mapping[int, Path]:
    """Return shared artifacts of the tiny model with 2 and with 12 layers, by depth."""
    return {n: export_tiny(tiny_source(config={"num_hidden_layers": n}), targets=("cpu",)) for n in (2, 12)}


@pytest.fixture(scope="session")
def savedmodel_artifact(savedmodel_packages: None, export_tiny: Callable[..., Path]) -> Path:
    """Return a shared artifact with targets cpu and savedmodel."""
    return export_tiny(targets=("cpu", "savedmodel"))


@pytest.fixture(scope="session")
def windowed_savedmodel(
    savedmodel_packages: None, export_tiny: Callable[..., Path], tiny_source: Callable[..., Any]
) -> Path:
    """Return a shared artifact as a SavedModel, with int4 weights, an int8 KV cache, two slots, and windows."""
    source = tiny_source(config={"model_type": "mistral", "sliding_window": 8})
    return export_tiny(source, targets=("portable", "savedmodel"), weights="int4", kv_cache="int8", slots=2)


@pytest.fixture(scope="session")
def prefixed_artifact(tiny_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the shared artifact with a stored prefix, "fox"."""
    from precast.loaders.add_prefix import PrefixSource, add_prefix

    root = tmp_path_factory.mktemp("prefixed") / "tiny"
    shutil.copytree(tiny_artifact, root)
    add_prefix(root, "fox", PrefixSource(system="the quick brown fox"), log=lambda _: None)
    return root


@pytest.fixture(scope="session")
def tiny_model(tiny_artifact: Path) -> Any:
    """Return the tiny artifact, loaded."""
    from precast.loaders.load import load

    return load(tiny_artifact)


@pytest.fixture(scope="session")
def slots_model(slots_artifact: Path) -> Any:
    """Return the artifact with three slots, loaded."""
    from precast.loaders.load import load

    return load(slots_artifact)


@pytest.fixture(scope="session")
def greedy() -> Callable[[Any, Sequence[int], int], tuple[int, ...]]:
    """Return a function that gives an engine's likeliest tokens after a prompt, which is read whole."""
    from precast.loaders.generation.engine import DecodeRow

    def answer(engine: Any, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        cache = engine.new_cache()
        tokens = [int(engine.prefill(list(prompt), cache).token[0])]
        for position in range(len(prompt), len(prompt) + count - 1):
            step = engine.decode([DecodeRow(0, tokens[-1], position)], cache)
            tokens.append(int(step.token[0]))
        return tuple(tokens)

    return answer


@pytest.fixture(scope="session")
def decode_blocks() -> Callable[[Any], np.ndarray]:
    """Dequantise quantised blocks into a float32 matrix ``[out, in]``."""
    from precast.exporter.block_formats import BLOCK_FORMATS

    def decode(blocks: Any) -> np.ndarray:
        form = BLOCK_FORMATS[blocks.format]
        return form.decode(form.pack(blocks.codes, *blocks.coefficients), *blocks.codes.shape)

    return decode


@pytest.fixture
def artifact_copy(tmp_path: Path, tiny_artifact: Path) -> Path:
    """Return a copy of the tiny artifact that the test may break."""
    return Path(shutil.copytree(tiny_artifact, tmp_path / "copy"))


@pytest.fixture
def edit_manifest() -> Callable[[Path, Callable[[dict[str, Any]], Any]], None]:
    """Return a function that applies a change to an artifact's parsed manifest and writes it back."""

    def edit(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        value = json.loads((root / "manifest.json").read_text())
        change(value)
        (root / "manifest.json").write_text(json.dumps(value))

    return edit


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal that shows progress in place of standard error."""
    from precast.loaders import progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    return stream


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a user without a home folder and without a configured cache folder."""

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PRECAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setenv("HOME", str(tmp_path))  # for children


# --- the reference ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def reference(tiny_source: Callable[..., Any]) -> Callable[[Sequence[int]], np.ndarray]:
    """Return the tiny model's uncached forward pass, from ids [T] to logits [T, V]; it compiles once, for T ≤ 64."""
    import jax

    from precast.exporter.models.parameters import abstract_model
    from precast.exporter.models.registry import read_model

    source = tiny_source()
    spec = read_model(source.config, source.name)
    model = abstract_model(spec)
    weights = [
        np.stack([source.tensors[name].read() for name in p.sources]).reshape(p.shape)
        for p in model.parameters
    ]
    cos, sin = spec.tables(64)
    forward = jax.jit(lambda tokens, *arrays: model.bind(arrays).forward(tokens, cos, sin))

    def logits(ids: Sequence[int]) -> np.ndarray:
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(forward(padded, *weights))[0, : len(ids)]

    return logits


# --- processes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs Python in a child process in the checkout, with a time limit."""

    def run(*arguments: str, stdin: str = "", env: Mapping[str, str] | None = None) -> Any:
        return subprocess.run(
            [sys.executable, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def cli() -> Callable[..., Any]:
    """Return a function that runs a command in this process; the result has exit_code, stdout and stderr."""
    # Import jax first: `precast run` blocks later imports of it in its process, which other tests need.
    import jax  # noqa: F401
    from click.testing import CliRunner

    from precast.cli import main

    def run(*arguments: object, stdin: str | bytes = "") -> Any:
        return CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)

    return run


@pytest.fixture
def record(cli: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``precast run --json`` and parses the line."""

    def run(*arguments: object, stdin: str | bytes = "") -> Any:
        result = cli("run", *arguments, "--json", stdin=stdin)
        assert result.exit_code == 0, result.output
        (line,) = result.stdout.splitlines()
        return json.loads(line)

    return run


@pytest.fixture(scope="session")
def answer(tiny_model: Any) -> Any:
    """The tiny model's greedy answer to the ids 7, 200 and 31."""
    from precast.loaders.generation.sampling_params import SamplingParams

    return tiny_model.generate([7, 200, 31], SamplingParams(ignore_eos=True))
