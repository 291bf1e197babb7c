"""The contenders of the benchmark.

Workers import this module in each interpreter, so it needs only the standard library.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

THREADS = 2
CAPACITY = 2048


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An inference engine with the model file that it runs.

    Attributes:
        label: name in tables and pictures.
        group: "int8", "int4", "float16" or "float32"; comparisons are within a group.
        worker: name of the module in this folder that runs the engine.
        interpreter: the Python interpreter that has the engine's packages, "peers" or "precast".
        model: name of the model's file or folder, as made by `derive`.
        options: further arguments for the worker's `load`.
    """

    label: str
    group: str
    worker: str
    interpreter: str
    model: str
    options: Mapping[str, object] = field(default_factory=dict)


def _precast(weights: str) -> Contender:
    return Contender(
        label=f"precast {weights}",
        group="float16" if weights == "bfloat16" else weights,  # both types have 16 bits
        worker="precast_worker",
        interpreter="precast",
        model=f"precast-{weights}-{CAPACITY}",
    )


def _llama_cpp(label: str, group: str, model: str) -> Contender:
    return Contender(
        label=f"llama.cpp {label}", group=group, worker="llama_cpp_worker", interpreter="peers", model=model
    )


def _openvino(label: str, group: str, model: str) -> Contender:
    return Contender(
        label=f"OpenVINO {label}", group=group, worker="openvino_worker", interpreter="peers", model=model
    )


CONTENDERS: Mapping[str, Contender] = {
    "precast-int8": _precast("int8"),
    "llama.cpp-q8_0": _llama_cpp("Q8_0", "int8", "q8_0.gguf"),
    "openvino-int8": _openvino("INT8", "int8", "openvino-int8"),
    "precast-int4": _precast("int4"),
    "llama.cpp-q4_1": _llama_cpp("Q4_1", "int4", "q4_1.gguf"),
    "llama.cpp-q4_0": _llama_cpp("Q4_0", "int4", "q4_0.gguf"),
    "openvino-int4": _openvino("INT4", "int4", "openvino-int4"),
    "precast-bfloat16": _precast("bfloat16"),
    "llama.cpp-f16": _llama_cpp("F16", "float16", "f16.gguf"),
    "openvino-float": _openvino("f16", "float16", "openvino-fp16"),
    "precast-float32": _precast("float32"),
    "transformers": Contender(
        label="transformers float32",
        group="float32",
        worker="transformers_worker",
        interpreter="peers",
        model="huggingface",
    ),
    "jit": Contender(
        label="our Flax model, jax.jit",
        group="float32",
        worker="jit_worker",
        interpreter="precast",
        model="huggingface",
    ),
}
# The float32 contender that is the reference for the predictions of all other contenders.
REFERENCE = "transformers"
