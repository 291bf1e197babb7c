"""Measure the decoding of a 7B model on a GPU in bfloat16, against the memory bandwidth and against transformers.

A decode step reads every weight and the filled part of the KV cache once. It therefore takes at least the time to read
these bytes at the bandwidth of the GPU's memory. The bandwidth is measured in the same process, just before the steps.
The model has the shape of Mistral 7B and random weights, which are as fast as trained weights. precast exports this
model into an artifact with golden answers, and then loads the artifact. The peer is transformers with torch.compile, in
the mode "reduce-overhead", which replays CUDA graphs. It runs in another process, with the same shape, a static cache
and bfloat16.

    python benchmarks/gpu.py [--shape 7b|tiny] [--platform cuda|cpu] [--steps 128] [--rounds 5]

The benchmark needs a GPU with at least 24 GB, about 35 GB of memory for the export's float32 reference, and 15 GB of
disk space. The options --platform cpu and --shape tiny are only for the test of this script; their figures have no
meaning. The output is a table, and one line of JSON at the end.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import machine

PROMPT_TOKENS = 128
PACKAGES = (
    "precast",
    "jax",
    "jaxlib",
    "jax-cuda12-pjrt",
    "jax-cuda13-pjrt",
    "numpy",
    "torch",
    "transformers",
)
_LLAMA = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
SHAPES: Mapping[str, Mapping[str, object]] = {
    "7b": {
        **_LLAMA,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        **_LLAMA,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 128,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    },
}


# --- the model ----------------------------------------------------------------------------------------------


def tensor_shapes(config: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a Llama model, by its name in a checkpoint."""
    d, f, v = (int(str(config[k])) for k in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, kv, h = (int(str(config[k])) for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    layer = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (heads * h, d),
        "self_attn.k_proj": (kv * h, d),
        "self_attn.v_proj": (kv * h, d),
        "self_attn.o_proj": (d, heads * h),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (v, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (v, d),
    }
    for i in range(int(str(config["num_hidden_layers"]))):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return random numbers with the magnitude of trained weights.

    The numbers depend only on the name and the shape, so each tensor is generated when it is read, and is never stored.
    """
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    values = np.random.default_rng(seed).integers(-127, 128, shape, np.int8).astype(np.float32)
    values *= (
        1.0 if "embed" in name else 1.5 * shape[1] ** -0.5
    ) / 73.6  # the standard deviation of `values`
    return values


def random_source(shape: str):
    """Return a source whose tensors are generated when they are read."""
    from precast.exporter.sources.base import Source, SourceTensor

    config = SHAPES[shape]
    return Source(
        name=f"random-{shape}",
        config=config,
        tensors={
            name: SourceTensor(shape=size, dtype="bfloat16", read=partial(random_tensor, name, size))
            for name, size in tensor_shapes(config).items()
        },
        tokenizer_json=_tokenizer(),
        chat_template=None,
        bos_token=None,
        eos_token=None,
        eos_token_ids=(),
        sampling={},
        licence=None,
        files=(),
    )


def _tokenizer() -> bytes:
    """Return a tokenizer whose tokens are bytes. It is unused, but an artifact must have a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


def prompt(vocab: int) -> list[int]:
    return [i * 7919 % vocab for i in range(1, PROMPT_TOKENS + 1)]


# --- the limit ----------------------------------------------------------------------------------------------


def step_bytes(manifest: dict, target: str, filled: int) -> int:
    """Return the number of bytes that a step reads.

    These are all weights except an untied embedding, and the filled positions of one slot.
    """
    programs = next(t for t in manifest["targets"] if t["name"] == target)["programs"]
    decode = next(p for p in programs if p["kind"] == "decode")
    weights = [a for a in decode["arguments"] if a["role"] == "weight"]
    head = any(a["name"].startswith("lm_head.") for a in weights)
    read = sum(_bytes(a) for a in weights if not (head and a["name"].startswith("model.embed_tokens.")))
    cache = sum(a["bytes"] for a in manifest["cache"])
    return read + cache * filled // (manifest["slots"] * manifest["capacity"])


def _bytes(value: dict) -> int:
    width = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}[value["dtype"]]
    return int(np.prod(value["shape"], dtype=np.int64)) * width


def bandwidth(device, gigabytes: float, rounds: int) -> float:
    """Measure the bandwidth of a device's memory in bytes per second. Use the faster of two loops: a sum, and x + 1."""
    import jax
    import jax.numpy as jnp

    count = int(gigabytes * 1e9) // 4
    loops: list[tuple[Callable, int]] = [(jnp.sum, 4 * count), (lambda x: x + 1, 8 * count)]
    best = 0.0
    with jax.default_device(device):
        x = jnp.ones(count, jnp.float32)
        for loop, size in loops:
            run = jax.jit(loop)
            run(x).block_until_ready()
            started = time.perf_counter()
            for _ in range(rounds):
                y = run(x)
            y.block_until_ready()
            best = max(best, rounds * size / (time.perf_counter() - started))
    return best


# --- precast ------------------------------------------------------------------------------------------------


def export_model(shape: str, platform: str, capacity: int, folder: Path) -> tuple[Path, float]:
    """Export the model for one target; return the artifact and the duration of the export in seconds."""
    from precast.exporter.export import export
    from precast.exporter.options import ExportOptions

    started, output = time.perf_counter(), folder / f"random-{shape}"
    options = ExportOptions(
        buckets=(PROMPT_TOKENS,), context=capacity, weights="bfloat16", targets=(platform,)
    )
    export(random_source(shape), output, options)
    return output, time.perf_counter() - started


def decode_speeds(artifact: Path, steps: int, rounds: int) -> dict:
    """Return the artifact's prefill time in seconds and its decoding speed in tokens per second, for each round."""
    from precast.loaders.generation.engine import DecodeRow
    from precast.loaders.load import load

    model = load(artifact)
    engine, ids = model.engine, prompt(model.manifest.model.vocab)
    prefills, speeds = [], []
    for _ in range(rounds + 1):
        cache = engine.new_cache()
        started = time.perf_counter()
        step = engine.prefill(ids, cache)
        token = int(step.token[0])
        decoding = time.perf_counter()
        for position in range(len(ids), len(ids) + steps):
            token = int(engine.decode([DecodeRow(0, token, position)], cache).token[0])
        prefills.append(decoding - started)
        speeds.append(steps / (time.perf_counter() - decoding))
    # Leave out the first round, which includes one-time work.
    return {"target": model.target.name, "prefill_s": prefills[1:], "tokens_per_s": speeds[1:]}


# --- the peer -----------------------------------------------------------------------------------------------


def run_torch(shape: str, platform: str, capacity: int, steps: int, rounds: int, backend: str) -> dict:
    """Measure transformers with torch.compile; run this in a new process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    config = LlamaConfig(**{k: v for k, v in SHAPES[shape].items() if k != "model_type"})
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(platform):
        model = LlamaForCausalLM(config).eval()
    how = {"mode": "reduce-overhead"} if backend == "inductor" else {}
    forward = torch.compile(model.forward, backend=backend, fullgraph=True, **how)
    ids = torch.tensor([prompt(config.vocab_size)], device=platform)
    prefills, speeds = [], []
    with torch.inference_mode():
        # Reuse one cache. A new cache would have other addresses, so torch would record the CUDA graphs again.
        cache = StaticCache(config=config, max_cache_len=capacity)
        for _ in range(rounds + 2):
            cache.reset()
            prefill, decode = _torch_round(torch, model, forward, cache, ids, steps)
            prefills.append(prefill)
            speeds.append(steps / decode)
    return {"prefill_s": prefills[2:], "tokens_per_s": speeds[2:], "backend": backend}


def _torch_round(torch, model, forward, cache, ids, steps: int) -> tuple[float, float]:
    """Return the durations of prefill and of all steps in seconds. As in precast, each token is copied to the host."""
    started = time.perf_counter()
    places = torch.arange(ids.shape[1], device=ids.device)
    out = model(input_ids=ids, past_key_values=cache, cache_position=places, use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    int(token)
    decoding = time.perf_counter()
    for position in range(ids.shape[1], ids.shape[1] + steps):
        place = torch.tensor([position], device=ids.device)
        out = forward(input_ids=token, past_key_values=cache, cache_position=place, use_cache=True)
        token = out.logits[:, -1:].argmax(-1).clone()
        int(token)
    return decoding - started, time.perf_counter() - decoding


def torch_in_a_child(arguments: argparse.Namespace) -> dict:
    """Return the result of `run_torch`, or the reason for skipping it."""
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        return {"skipped": f"{' and '.join(missing)} not installed"}
    command = [sys.executable, __file__, "--peer", *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"skipped": (done.stderr.strip().splitlines() or ["failed"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


# --- the report ---------------------------------------------------------------------------------------------


def summary(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(facts: dict) -> str:
    """Return the results as a Markdown table."""
    limit = facts["limit_tokens_per_s"]
    rows = [
        ("memory bandwidth, measured", f"{facts['bandwidth_bytes_per_s'] / 1e9:.0f} GB/s"),
        ("bytes of a step", f"{facts['step_bytes'] / 1e9:.3f} GB: at most {limit:.1f} tokens/s"),
    ]
    for name in ("precast", "torch"):
        found = facts[name]
        if "skipped" in found:
            rows.append((name, f"not run: {found['skipped']}"))
            continue
        speed = found["decode_tokens_per_s"]["median"]
        rows.append((f"{name}: decode", f"{speed:.1f} tokens/s: {speed / limit:.0%} of the limit"))
        rows.append((f"{name}: prefill of {PROMPT_TOKENS}", f"{found['prefill_s']['median'] * 1e3:.1f} ms"))
    if "skipped" not in facts["torch"]:
        speeds = [facts[name]["decode_tokens_per_s"]["median"] for name in ("precast", "torch")]
        rows.append(("precast over torch, decode", f"{speeds[0] / speeds[1]:.2f}×"))
    head = f"{facts['shape']} on {facts['device']}, bfloat16, capacity {facts['capacity']}"
    return "\n".join([f"| {head} | |", "|---|---:|", *(f"| {a} | {b} |" for a, b in rows)])


def _figures(found: dict) -> dict:
    if "skipped" in found:
        return found
    rest = {k: v for k, v in found.items() if k not in ("prefill_s", "tokens_per_s")}
    return rest | {
        "prefill_s": summary(found["prefill_s"]),
        "decode_tokens_per_s": summary(found["tokens_per_s"]),
    }


def find_device(platform: str):
    """Return the device to measure; exit with an error if it is missing."""
    if find_spec("jax") is None:
        raise SystemExit("benchmarks/gpu.py exports the model itself: pip install 'precast[export]'.")
    import jax

    from precast.exporter.targets.cuda import cuda_device
    from precast.loaders.artifact.errors import PrecastError

    try:
        return cuda_device() if platform == "cuda" else jax.devices("cpu")[0]
    except PrecastError as error:
        raise SystemExit(f"benchmarks/gpu.py measures GPUs, and there is none: {error}") from None


def measure(arguments: argparse.Namespace) -> dict:
    """Run precast and the peer; return all results."""
    device = find_device(arguments.platform)
    # Run the peer first, while this process uses none of the device's memory.
    peer = torch_in_a_child(arguments)
    with tempfile.TemporaryDirectory(prefix="precast-gpu-") as folder:
        artifact, export_s = export_model(
            arguments.shape, arguments.platform, arguments.capacity, Path(folder)
        )
        manifest = json.loads((artifact / "manifest.json").read_text())
        rate = bandwidth(device, arguments.gigabytes, rounds=20)
        found = decode_speeds(artifact, arguments.steps, arguments.rounds)
    size = step_bytes(manifest, found["target"], PROMPT_TOKENS + arguments.steps // 2)
    return {
        "benchmark": "gpu",
        "shape": arguments.shape,
        "platform": arguments.platform,
        "device": device.device_kind,
        "capacity": arguments.capacity,
        "prompt_tokens": PROMPT_TOKENS,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "export_s": export_s,
        "bandwidth_bytes_per_s": rate,
        "step_bytes": size,
        "limit_tokens_per_s": rate / size,
        "precast": _figures(found),
        "torch": _figures(peer),
    } | machine.describe(PACKAGES)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--capacity", type=int, default=512, help="positions of the cache")
    parser.add_argument("--steps", type=int, default=128, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--gigabytes", type=float, default=4.0, help="size of the array that bandwidth is measured on"
    )
    parser.add_argument("--torch-backend", default="inductor", help="backend of torch.compile")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        given = (arguments.shape, arguments.platform, arguments.capacity, arguments.steps, arguments.rounds)
        print(json.dumps(run_torch(*given, arguments.torch_backend)))
        return
    facts = measure(arguments)
    print(report(facts) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
