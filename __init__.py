"""precast: language models as ahead-of-time compiled artifacts.

model = precast.load("artifacts/smollm2-135m-instruct-int8")
print(model.generate("The capital of France is", precast.SamplingParams(max_tokens=16)).text)
"""

# Importing typing would take milliseconds.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from .loaders.artifact.errors import PrecastError
    from .loaders.generation.model import Model
    from .loaders.generation.sampling_params import SamplingParams
    from .loaders.generation.state_file import State
    from .loaders.generation.stream import Completion, Stream, Timing
    from .loaders.load import load

__all__ = ["Completion", "Model", "PrecastError", "SamplingParams", "State", "Stream", "Timing", "load"]

_MODULES = {
    "Completion": "generation.stream",
    "Model": "generation.model",
    "PrecastError": "artifact.errors",
    "SamplingParams": "generation.sampling_params",
    "State": "generation.state_file",
    "Stream": "generation.stream",
    "Timing": "generation.stream",
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
