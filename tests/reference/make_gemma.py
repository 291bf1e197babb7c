"""Write ``gemma.json``: Gemma 3 270M in Q4_K_M, as llama.cpp dequantises it, and llama.cpp's answers in float32.

Run by hand where llama-cpp-python and gguf are installed::

    python tests/reference/make_gemma.py gemma-3-270m-q4_k_m.gguf

llama.cpp itself converts the file to float32. The record contains a hash of each converted tensor, and greedy tokens
of the converted file with float32 keys and values. The margin of a token is the lead of its logit over the second best.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

RECORD = Path(__file__).parent / "gemma.json"
TOKENS = 24
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived an old",
    "Water boils at a temperature of 100 degrees because",
    "1, 1, 2, 3, 5, 8, 13,",
)


def convert(file: Path, output: Path) -> None:
    """Let llama.cpp dequantise a GGUF file to float32."""
    import llama_cpp as lib

    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize = lib.LLAMA_FTYPE_ALL_F32, True
    if lib.llama_model_quantize(str(file).encode(), str(output).encode(), parameters):
        raise SystemExit(f"{file}: llama.cpp could not convert the file to float32")


def tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the values of each tensor of a float32 file; llama.cpp adds 1 to the weights of norms."""
    from gguf import GGUFReader

    for tensor in GGUFReader(file).tensors:
        is_norm = tensor.name.endswith("norm.weight")
        yield tensor.name, tensor.data - np.float32(1) if is_norm else tensor.data


def digest(array: np.ndarray) -> str:
    """Return 16 hexadecimal digits of the hash of an array's bits, in which −0 counts as 0."""
    return hashlib.sha256(np.ascontiguousarray(array + np.float32(0)).tobytes()).hexdigest()[:16]


def answer(model: Any, prompt: str) -> dict[str, Any]:
    """Return the greedy tokens after a prompt, and the margin of each."""
    ids = model.tokenize(prompt.encode())
    model.reset()
    model.eval(ids)
    found: list[int] = []
    margins: list[float] = []
    for _ in range(TOKENS):
        logits = model.scores[model.n_tokens - 1]
        second, best = np.argsort(logits)[-2:]
        found.append(int(best))
        margins.append(round(float(logits[best] - logits[second]), 4))
        model.eval([found[-1]])
    return {"text": prompt, "prompt_token_ids": ids, "token_ids": found, "margins": margins}


def main(file: Path) -> None:
    from llama_cpp import GGML_TYPE_F32, Llama, __version__

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "float.gguf"
        convert(file, output)
        hashes = {name: digest(array) for name, array in tensors(output)}
        model = Llama(
            str(output), n_ctx=512, logits_all=True, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, verbose=False
        )
        cases = [answer(model, prompt) for prompt in PROMPTS]
    record = {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "llama-cpp-python": __version__,
        "tensors": hashes,
        "cases": cases,
    }
    RECORD.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
