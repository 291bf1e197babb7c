"""Measure the cost of three mistakes in a JAX decoder, alone and together, compared with an artifact.

1. Every layer recomputes the RoPE tables at every step.
2. There is no KV cache, so every step processes the whole sequence again.
3. The shapes grow with the sequence, so jit traces and compiles again at every step.

Each variant generates the same greedy tokens from the same weights, in a new process. The variants are: all three
mistakes, only one of them fixed, all of them fixed under jit, and the artifact. As in most code of this kind, the
layers are unrolled, and each layer has separate arrays of weights. Times include compilation, because users wait for
it.

    python benchmarks/three_mistakes.py [--models smollm2 qwen2] [--tokens 24]

The output is a table for each model, and one line of JSON at the end.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import machine

PROMPT_TOKENS = 32
CAPACITY = 128


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A decoder with none, some or all of the mistakes fixed."""

    title: str
    tables_once: bool
    cache: bool
    one_shape: bool


VARIANTS = {
    "all": Variant(title="all three mistakes", tables_once=False, cache=False, one_shape=False),
    "rope": Variant(title="only RoPE tables fixed", tables_once=True, cache=False, one_shape=False),
    "cache": Variant(title="only the cache fixed", tables_once=False, cache=True, one_shape=False),
    "shape": Variant(title="only the shape fixed", tables_once=False, cache=False, one_shape=True),
    "fixed": Variant(title="all fixed, under jit", tables_once=True, cache=True, one_shape=True),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of one generation.

    Attributes:
        token_ids: the answer.
        first_token_s: seconds from the start of the process to the first token.
        tokens_per_s: tokens per second after the first token, including compilation.
        steady_tokens_per_s: inverse of the median time of a step.
        compiles: number of programs that the process compiled.
    """

    token_ids: tuple[int, ...]
    first_token_s: float
    tokens_per_s: float
    steady_tokens_per_s: float
    compiles: int


# ---------------------------------------------------------------------------------------------------------------
# A decoder in the usual style: a list of layers, a loop in Python, plain jax.numpy.


def _build(variant: Variant, shape: dict, weights: dict) -> Callable:  # noqa: C901  # a whole decoder in the usual style
    """Return a function ``generate(prompt, n) -> (tokens, time at which each token was ready)``."""
    import jax
    import jax.numpy as jnp

    heads, kv_heads, dim, eps = shape["heads"], shape["kv_heads"], shape["head_dim"], shape["eps"]
    prefix = "model.layers."
    stacks = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    params = {
        "layers": [{k: jnp.asarray(v[i]) for k, v in stacks.items()} for i in range(shape["layers"])],
        "embed": jnp.asarray(weights["model.embed_tokens.weight"]),
        "norm": jnp.asarray(weights["model.norm.weight"][0]),
        "frequencies": jnp.asarray(shape["frequencies"], jnp.float32),
    }
    if "lm_head.weight" in weights:
        params["head"] = jnp.asarray(weights["lm_head.weight"][0])
    max_positions = shape["max_positions"]

    def tables(params):
        angles = jnp.arange(max_positions, dtype=jnp.float32)[:, None] * params["frequencies"]
        return jnp.cos(angles), jnp.sin(angles)

    def norm(x, weight):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight

    def linear(x, layer, name):
        y = x @ layer[f"{name}.weight"].T
        return y + layer[f"{name}.bias"] if f"{name}.bias" in layer else y

    def rotate(x, cos, sin):
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(q, k, v, mask):
        q = q.reshape(q.shape[0], kv_heads, heads // kv_heads, dim)
        scores = jnp.einsum("tkgh,skh->kgts", q, k) * dim**-0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)
        return jnp.einsum("kgts,skh->tkgh", weights, v).reshape(q.shape[0], heads * dim)

    def forward(params, tokens, start, past, rope):
        """Process tokens ``[T]`` at positions ``start …``; `past` is (k, v) for each layer, or None: no KV cache."""
        positions = start + jnp.arange(tokens.shape[0])
        x, new = params["embed"][tokens], []
        for i, layer in enumerate(params["layers"]):
            cos, sin = rope if variant.tables_once else tables(params)
            cos, sin = cos[positions][:, None], sin[positions][:, None]
            h = norm(x, layer["input_layernorm.weight"])
            q, k, v = (
                linear(h, layer, f"self_attn.{n}_proj").reshape(len(h), -1, dim) for n in ("q", "k", "v")
            )
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            if past is not None and variant.one_shape:
                k, v = (
                    jax.lax.dynamic_update_slice_in_dim(past[i][j], n, start, 0) for j, n in enumerate((k, v))
                )
            elif past is not None:
                k, v = (jnp.concatenate([past[i][j], n]) for j, n in enumerate((k, v)))
            new.append((k, v))
            mask = jnp.arange(k.shape[0]) <= positions[:, None]
            x = x + linear(attend(q, k, v, mask), layer, "self_attn.o_proj")
            h = norm(x, layer["post_attention_layernorm.weight"])
            x = x + linear(
                jax.nn.silu(linear(h, layer, "mlp.gate_proj")) * linear(h, layer, "mlp.up_proj"),
                layer,
                "mlp.down_proj",
            )
        return norm(x, params["norm"]), new

    def head(params, x):
        return jnp.argmax(x @ params.get("head", params["embed"]).T)

    def uncached(params, tokens, length, rope):
        x, _ = forward(params, tokens, 0, None, rope)
        return head(params, x[length - 1])

    def cached(params, tokens, start, last, past, rope):
        x, past = forward(params, tokens, start, past, rope)
        return head(params, x[last]), past

    step = jax.jit(uncached) if not variant.cache else jax.jit(cached, donate_argnums=(4,))
    rope = jax.jit(tables)(params) if variant.tables_once else None

    def empty():
        size = CAPACITY if variant.one_shape else 0
        return [tuple(jnp.zeros((size, kv_heads, dim)) for _ in range(2)) for _ in params["layers"]]

    def generate(prompt, n):
        ids, past, out, times = list(prompt), empty() if variant.cache else None, [], []
        for i in range(n):
            if not variant.cache:
                row = np.array(ids + [0] * (CAPACITY - len(ids)) if variant.one_shape else ids, np.int32)
                token = step(params, row, len(ids), rope)
            else:
                new = ids if i == 0 else ids[-1:]
                token, past = step(
                    params, np.array(new, np.int32), len(ids) - len(new), len(new) - 1, past, rope
                )
            out.append(int(token))
            ids.append(out[-1])
            times.append(time.perf_counter())
        return out, times

    return generate


def run_variant(name: str, artifact: Path, facts: dict, prompt: Sequence[int], tokens: int) -> Result:
    """Generate with a variant in this process, which must have done nothing else before."""
    import jax

    from precast.loaders.artifact.manifest_parser import parse_manifest
    from precast.loaders.artifact.weights import map_weights
    from precast.loaders.console.clock import process_age

    compiles = 0

    def count(event: str, _: float, **__: object) -> None:
        nonlocal compiles
        compiles += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    m = parse_manifest((artifact / "manifest.json").read_bytes(), "manifest").model
    shape = {"layers": m.layers, "heads": m.heads, "kv_heads": m.kv_heads, "head_dim": m.head_dim} | facts
    generate = _build(VARIANTS[name], shape, map_weights(artifact / "weights.safetensors"))
    compiles = 0
    out, times = generate(prompt, tokens)
    age = process_age() - (time.perf_counter() - times[0])
    steps = np.diff(times)
    return Result(
        token_ids=tuple(out),
        first_token_s=round(age, 3),
        tokens_per_s=round(len(steps) / float(np.sum(steps)), 3),
        steady_tokens_per_s=round(1 / float(np.median(steps)), 3),
        compiles=compiles,
    )


# ---------------------------------------------------------------------------------------------------------------
# The models, the artifact, and the table.


def _qwen2_source():
    """Return a source with the shape of Qwen2 0.5B (24 layers) and random weights."""
    from tokenizers import Tokenizer, models

    from precast.exporter.models.parameters import abstract_model
    from precast.exporter.models.registry import read_model
    from precast.exporter.sources.base import Source, SourceTensor

    config = {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }

    def read(name: str, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
        seed = int.from_bytes(name.encode(), "little") % 2**63
        scale = 0.04 if "embed" in name else shape[-1] ** -0.5
        return lambda: (
            np.ones(shape, np.float32)
            if "norm" in name
            else np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(scale)
        )

    parameters = abstract_model(read_model(config, "qwen2")).parameters
    tensors = {
        name: SourceTensor(shape=p.source_shape, dtype="float32", read=read(name, p.source_shape))
        for p in parameters
        for name in p.sources
    }
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    return Source(
        name="qwen2-0.5b-shape-random",
        config=config,
        tensors=tensors,
        tokenizer_json=words.to_str().encode(),
        chat_template=None,
        bos_token=None,
        eos_token=None,
        eos_token_ids=(),
        sampling={},
        licence=None,
        files=(),
    )


def _demo_source():
    from precast.exporter.sources.open import open_source

    return open_source(None)


MODELS = {"smollm2": _demo_source, "qwen2": _qwen2_source}


def _export(source, folder: Path) -> tuple[Path, dict]:
    """Export a model; return the artifact, and the settings that the variants need in addition."""
    from precast.exporter.export import export
    from precast.exporter.models.registry import read_model
    from precast.exporter.options import ExportOptions

    spec = read_model(source.config, source.name)
    artifact = folder / source.name
    export(
        source,
        artifact,
        ExportOptions(buckets=(PROMPT_TOKENS,), context=CAPACITY, weights="float32", targets=("cpu",)),
    )
    facts = {
        "eps": spec.config.norm_eps,
        "frequencies": spec.ropes[0].frequencies.tolist(),
        "max_positions": spec.config.max_positions,
    }
    return artifact, facts


def _child(arguments: Sequence[str], given: str | None = None) -> dict:
    done = subprocess.run([sys.executable, *arguments], input=given, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[:4])} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _run_artifact(artifact: Path, prompt: Sequence[int], tokens: int) -> Result:
    """Return the median of three calls of ``precast run``."""
    ids = ",".join(map(str, prompt))
    arguments = [
        "-m",
        "precast.cli",
        "run",
        str(artifact),
        "--ids",
        ids,
        "-n",
        str(tokens),
        "--ignore-eos",
        "--json",
    ]
    runs = [_child(arguments) for _ in range(3)]
    speed = statistics.median(r["timing"]["decode_tokens_per_s"] for r in runs)
    return Result(
        token_ids=tuple(runs[0]["token_ids"]),
        first_token_s=statistics.median(r["timing"]["first_token_s"] for r in runs),
        tokens_per_s=speed,
        steady_tokens_per_s=speed,
        compiles=runs[0]["compiles"],
    )


def measure(model: str, tokens: int) -> dict:
    """Run all variants of a model; exit with an error if their tokens differ."""
    with tempfile.TemporaryDirectory(prefix="precast-benchmark-") as folder:
        print(f"{model}: exporting", file=sys.stderr)
        artifact, facts = _export(MODELS[model](), Path(folder))
        vocab = json.loads((artifact / "manifest.json").read_text())["model"]["vocab"]
        prompt = [i * 7919 % vocab for i in range(1, PROMPT_TOKENS + 1)]
        results = {}
        for name in VARIANTS:
            print(f"{model}: {VARIANTS[name].title}", file=sys.stderr)
            job = {"artifact": str(artifact), "facts": facts, "prompt": prompt, "tokens": tokens}
            results[name] = Result(**_child([__file__, "--variant", name], json.dumps(job)))
        results["artifact"] = _run_artifact(artifact, prompt, tokens)
    answers = {tuple(r.token_ids) for r in results.values()}
    if len(answers) != 1:
        raise SystemExit(f"{model}: the variants disagree: { {n: r.token_ids for n, r in results.items()} }")
    return {name: asdict(r) | {"token_ids": None} for name, r in results.items()}


def _table(model: str, results: dict) -> str:
    base = results["all"]["tokens_per_s"]
    lines = [
        f"| {model} | tokens/s | against all three | once compiled, tokens/s | start to first token, s | compiles |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, r in results.items():
        title = VARIANTS[name].title if name in VARIANTS else "the artifact"
        lines.append(
            f"| {title} | {r['tokens_per_s']:.2f} | {r['tokens_per_s'] / base:.1f}× | {r['steady_tokens_per_s']:.2f}"
            f" | {r['first_token_s']:.2f} | {r['compiles']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        job = json.load(sys.stdin)
        result = run_variant(
            arguments.variant, Path(job["artifact"]), job["facts"], job["prompt"], job["tokens"]
        )
        print(json.dumps(asdict(result)))
        return
    results = {model: measure(model, arguments.tokens) for model in arguments.models}
    for model, rows in results.items():
        print(_table(model, rows) + "\n")
    record = {
        "benchmark": "three_mistakes",
        "tokens": arguments.tokens,
        "results": results,
    } | machine.describe()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
