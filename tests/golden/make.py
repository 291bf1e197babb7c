"""Make a small artifact in this folder, named after today's date and the current format version.

    python tests/golden/make.py [--date 2026-11-22] [--output tests/golden] [--bare]

Run the script once for each format version, with the last code that writes this version, and commit the artifact. An
artifact is never regenerated, because tests load it with later versions of precast. The script also runs in a checkout
of an older precast: set `PYTHONPATH` to a folder that contains a symlink `precast` to the checkout. For a version that
is no longer supported, `--bare` leaves out the executables.
"""

import argparse
import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 16,
    "vocab_size": 264,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}<assistant>"
PREFIX = "Be brief: "
LARGEST = 300_000


def tokenizer_json() -> bytes:
    """Return a tokenizer with a token for each byte and two further tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({char: i + 2 for i, char in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return library.to_str().encode()


def tensors() -> dict[str, np.ndarray]:
    d, f, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    layer = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (CONFIG["vocab_size"], d),
        "model.norm.weight": (d,),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    random = np.random.default_rng(0)
    made = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return {name: 1 + v / 10 if v.ndim == 1 else v * np.float32(1.5 * d**-0.5) for name, v in made.items()}


def tensor(array: np.ndarray, number: int) -> Any:
    """Return an array as a `SourceTensor`. Since format 7, the matrices use three block formats in turn."""
    from precast.exporter.sources.base import SourceTensor
    from precast.loaders.artifact.manifest import FORMAT_VERSION

    if FORMAT_VERSION < 7 or array.ndim < 2:
        return SourceTensor(shape=array.shape, dtype="float32", read=array.copy)
    from precast.exporter.block_formats import BLOCK_FORMATS
    from precast.exporter.block_quantise import quantise
    from precast.exporter.sources.base import QuantisedBlocks

    kind = BLOCK_FORMATS[("q4_k", "q6_k", "q5_0")[number % 3]]
    codes, *coefficients = quantise(kind, array)
    blocks = QuantisedBlocks(format=kind.name, codes=codes, coefficients=tuple(coefficients))
    decoded = kind.decode(kind.pack(codes, *coefficients), *array.shape)
    return SourceTensor(
        shape=array.shape, dtype=kind.name, read=decoded.copy, block_format=kind.name, blocks=lambda: blocks
    )


def source() -> Any:
    """Return the tiny model as a `Source` in memory."""
    from precast.exporter.sources.base import Source

    return Source(
        name="golden",
        config=CONFIG,
        tensors={name: tensor(array, i) for i, (name, array) in enumerate(tensors().items())},
        tokenizer_json=tokenizer_json(),
        chat_template=TEMPLATE,
        bos_token="<s>",
        eos_token="</s>",
        eos_token_ids=(1,),
        sampling={},
        licence="Apache-2.0",
        files=(),
    )


def export_golden(folder: Path) -> None:
    """Export the default targets with the format's latest kind of weights and, if the format has prefixes, a prefix."""
    from precast.exporter.export import export
    from precast.exporter.options import ExportOptions
    from precast.loaders.artifact.manifest import FORMAT_VERSION

    # Format 1 has only float32 weights. Format 7 is the first format with mixed weights.
    weights = "float32" if FORMAT_VERSION == 1 else "bfloat16" if FORMAT_VERSION < 7 else "source"
    export(source(), folder, ExportOptions(buckets=(8,), context=32, weights=weights))
    if FORMAT_VERSION > 5:
        from precast.loaders.add_prefix import PrefixSource, add_prefix

        add_prefix(folder, "system", PrefixSource(text=PREFIX), log=lambda _: None)


def strip(folder: Path) -> None:
    """Remove the executables; the manifest still lists them."""
    for path in folder.rglob("*.xla"):
        path.unlink()


def make(output: Path, day: str, *, bare: bool = False) -> Path:
    """Make the artifact and return its folder."""
    from precast.loaders.artifact.manifest import FORMAT_VERSION

    folder = output / f"{day}-format-{FORMAT_VERSION}"
    export_golden(folder)
    if bare:
        strip(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST:
        shutil.rmtree(folder)
        raise SystemExit(f"{folder}: {size} bytes are more than the {LARGEST} that a repository should carry")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--date", default=date.today().isoformat())
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--bare", action="store_true", help="leave the executables out")
    arguments = parser.parse_args()
    folder = make(arguments.output, arguments.date, bare=arguments.bare)
    sizes = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    print(json.dumps({"made": str(folder), "bytes": sum(sizes.values()), "files": sizes}, indent=1))


if __name__ == "__main__":
    main()
