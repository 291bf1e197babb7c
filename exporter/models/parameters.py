"""A module's parameters as a flat list, in the order of the programs' arguments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from flax import nnx

from .blocks import DecoderConfig
from .decoder import Decoder
from .ops import Weight
from .registry import ModelSpec

# In a checkpoint's names, a layer's number follows LAYERS and an expert's number follows EXPERTS. A parameter's
# name has neither number, because a parameter is a stack over all layers, or over all experts of all layers.
LAYERS, EXPERTS = "model.layers.", ".experts."
# The parameters that are not stacks. Other parameters outside the layers, such as the output head's weight, are stacks
# with a single entry, because `Linear` and the norms store stacks.
_PLAIN = ("model.embed_tokens.weight", "model.embed_positions.weight")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of the model.

    Attributes:
        name: path in the module ("model.layers.self_attn.q_proj.weight").
        shape: shape in the module; for a parameter of the layers, ``[L, …]``.
        sources: names of the checkpoint's tensors that make up the parameter: one for each index of the first
            axis, in order, or a single name if the parameter is not a stack.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape of each of the tensors in `sources`."""
        return self.shape[1:] if self._is_stack else self.shape

    @property
    def _is_stack(self) -> bool:
        return self.name not in _PLAIN


def _sources(name: str, c: DecoderConfig) -> tuple[str, ...]:
    if not name.startswith(LAYERS):
        return (name,)
    names = [f"{LAYERS}{i}.{name.removeprefix(LAYERS)}" for i in range(c.layers)]
    if EXPERTS not in name or c.mixture is None:
        return tuple(names)
    return tuple(n.replace(EXPERTS, f"{EXPERTS}{e}.") for n in names for e in range(c.mixture.experts))


@dataclass(frozen=True, kw_only=True)
class AbstractModel:
    """A model without weights.

    Attributes:
        parameters: the parameters in a fixed order.
        bind: takes arrays in the order of `parameters`, and returns the module with these weights.
    """

    parameters: tuple[Parameter, ...]
    bind: Callable[[Sequence[Weight]], Decoder]


def abstract_model(spec: ModelSpec) -> AbstractModel:
    """Build the module of a model without allocating arrays."""
    graph, state = nnx.split(nnx.eval_shape(lambda: spec.architecture.module(spec.config)))
    flat = sorted((".".join(map(str, path)), path, leaf) for path, leaf in nnx.to_flat_state(state))
    parameters = tuple(
        Parameter(name=name, shape=tuple(leaf.shape), sources=_sources(name, spec.config))
        for name, _, leaf in flat
    )

    def bind(arrays: Sequence[Weight]) -> Decoder:
        bound = [(path, leaf.replace(array)) for (_, path, leaf), array in zip(flat, arrays, strict=True)]
        module: Decoder = nnx.merge(graph, nnx.from_flat_state(bound))
        return module

    return AbstractModel(parameters=parameters, bind=bind)


def unknown_sources(parameters: Sequence[Parameter], found: Mapping[str, object]) -> list[str]:
    """Return the names of checkpoint tensors that belong to no parameter, sorted."""
    used = {source for p in parameters for source in p.sources}
    return sorted(set(found) - used)
