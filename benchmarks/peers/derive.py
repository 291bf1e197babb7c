"""Make the contenders' model files from the demo model's GGUF file, and keep them in bench/ in precast's cache folder.

    python derive.py NAME FOLDER     # in the interpreter that `MAKERS` names

All files are made from the same float32 values, to which the Q4_1 blocks and the Q8_0 embedding of the GGUF file
dequantise. The contender in Q4_1 is the GGUF file itself, so its weights equal those of the reference. Every other
format rounds the values once.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

# The matrices of this model have 576 or 1536 columns. 576 is a multiple of 64, but not of OpenVINO's usual 128.
OPENVINO_GROUP = 64


def huggingface(folder: Path, spec: str | None = None) -> None:
    """Write a model in float32 for transformers.

    Args:
        folder: the folder to make.
        spec: the source, as `open_source` takes it; None for the demo model.
    """
    import numpy as np
    from safetensors.numpy import save_file

    from precast.exporter.sources.open import open_source

    source = open_source(spec)
    folder.mkdir()
    tensors = {name: np.ascontiguousarray(t.read()) for name, t in source.tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_bytes(source.tokenizer_json)
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": source.bos_token,
        "eos_token": source.eos_token,
        "chat_template": source.chat_template,
        "clean_up_tokenization_spaces": False,
    }
    texts = {
        "config.json": dict(source.config) | {"dtype": "float32"},
        "tokenizer_config.json": tokenizer,
        "generation_config.json": {"eos_token_id": list(source.eos_token_ids)},
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=1))


def demo_gguf(path: Path) -> None:
    """Copy the published GGUF file of the demo model."""
    from precast.exporter.sources import demo
    from precast.loaders.artifact.cache_folder import cache_folder

    shutil.copyfile(demo.fetch(demo.DEMO, cache_folder() / "demo"), path)


def gguf(source: str, file_type: str) -> Callable[[Path], None]:
    """Return a function that quantises a GGUF file to another type with llama.cpp's own quantiser."""

    def make(path: Path) -> None:
        import llama_cpp as lib

        parameters = lib.llama_model_quantize_default_params()
        parameters.ftype = getattr(lib, f"LLAMA_FTYPE_{file_type}")
        parameters.allow_requantize = True
        parameters.nthread = os.cpu_count()
        if lib.llama_model_quantize(str(cache(source)).encode(), str(path).encode(), parameters):
            raise SystemExit(f"{path.name}: llama.cpp could not quantise {source}")

    return make


def openvino(*options: str, source: str = "huggingface") -> Callable[[Path], None]:
    """Return a function that exports the model and its tokenizer for OpenVINO, with weights compressed by nncf."""

    def make(folder: Path) -> None:
        tool = Path(sys.executable).parent / "optimum-cli"
        task = ("--task", "text-generation-with-past", "--library", "transformers")
        command = [tool, "export", "openvino", "--model", cache(source), *task, *options, folder]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, env=environment)

    return make


# For each file: the interpreter whose packages make it, the files that it is made from, and the function that makes it.
Makers = Mapping[str, tuple[str, tuple[str, ...], Callable[[Path], None]]]
MAKERS: Makers = {
    "huggingface": ("precast", (), huggingface),
    "q4_1.gguf": ("precast", (), demo_gguf),
    "f32.gguf": ("peers", ("q4_1.gguf",), gguf("q4_1.gguf", "ALL_F32")),
    "f16.gguf": ("peers", ("f32.gguf",), gguf("f32.gguf", "MOSTLY_F16")),
    "q8_0.gguf": ("peers", ("f32.gguf",), gguf("f32.gguf", "MOSTLY_Q8_0")),
    "q4_0.gguf": ("peers", ("f32.gguf",), gguf("f32.gguf", "MOSTLY_Q4_0")),
    "openvino-fp16": ("peers", ("huggingface",), openvino("--weight-format", "fp16")),
    "openvino-int8": ("peers", ("huggingface",), openvino("--weight-format", "int8")),
    "openvino-int4": (
        "peers",
        ("huggingface",),
        openvino("--weight-format", "int4", "--group-size", str(OPENVINO_GROUP), "--ratio", "1.0"),
    ),
}


def cache(name: str) -> Path:
    """Return the path of a derived file, which may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PRECAST_CACHE") or Path(home) / "precast").expanduser() / "bench" / name


def obtain(
    name: str, interpreters: Mapping[str, str], makers: Makers = MAKERS, script: str = __file__
) -> Path:
    """Make a derived file or folder if it is missing; return its path.

    Args:
        name: a key of `makers`.
        interpreters: paths of the interpreters "peers" and "precast".
        makers: the files that can be made.
        script: the script whose `main` makes them.
    """
    path = cache(name)
    if path.exists():
        return path
    whose, parts, _ = makers[name]
    for part in parts:
        obtain(part, interpreters, makers, script)
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"making {path}", file=sys.stderr, flush=True)
    subprocess.run([interpreters[whose], script, name, str(path)], check=True, stdout=sys.stderr)
    return path


def precast_artifact(weights: str, context: int, interpreters: Mapping[str, str], *, keep: bool) -> Path:
    """Export the demo model and return its artifact; with `keep`, return an existing artifact unchanged."""
    path = cache(f"precast-{weights}-{context}")
    if keep and (path / "manifest.json").exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"exporting {path}", file=sys.stderr, flush=True)
    options = ["--weights", weights, "--context", str(context), "--buckets", "16,64,128,512", "--overwrite"]
    command = [interpreters["precast"], "-m", "precast.cli", "export", "-o", str(path), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def main(makers: Makers = MAKERS) -> None:
    name, target = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as temporary:
        made = Path(temporary) / target.name
        makers[name][2](made)
        os.replace(made, target)


if __name__ == "__main__":
    main()
