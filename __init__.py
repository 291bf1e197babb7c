"""precast: language models as ahead-of-time compiled artifacts.

model = precast.load("artifacts/smollm2-135m-instruct-int8")
print(model.generate("The capital of France is", precast.SamplingParams(max_tokens=16)).text)
"""

# Importing typing would take milliseconds.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from .loaders.artifact.errors import PrecastError
    from .loaders.generation.logprobs import TokenLogprob
    from .loaders.generation.model import Model
    from .loaders.generation.sampling_params import SamplingParams
    from .loaders.generation.state_file import State
    from .loaders.generation.stream import Completion, Stream, Timing
    from .loaders.load import load
    from .loaders.text.answer_parser import ContentDelta, ReasoningDelta, ToolCallDelta
    from .loaders.text.tool_calls import ToolCall

__all__ = [
    "Completion",
    "ContentDelta",
    "Model",
    "PrecastError",
    "ReasoningDelta",
    "SamplingParams",
    "State",
    "Stream",
    "Timing",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "load",
]

_MODULES = {
    "Completion": "generation.stream",
    "ContentDelta": "text.answer_parser",
    "Model": "generation.model",
    "PrecastError": "artifact.errors",
    "ReasoningDelta": "text.answer_parser",
    "SamplingParams": "generation.sampling_params",
    "State": "generation.state_file",
    "Stream": "generation.stream",
    "Timing": "generation.stream",
    "TokenLogprob": "generation.logprobs",
    "ToolCall": "text.tool_calls",
    "ToolCallDelta": "text.answer_parser",
    "load": "load",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    # Lazy imports keep `import precast` fast.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.loaders.{_MODULES[name]}"), name)
