"""A module's parameters as a flat list of names, which is how programs and artifacts know them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from flax import nnx

from . import ModelSpec
from .blocks import DecoderConfig
from .decoder import Decoder
from .ops import Weight

# Where a checkpoint's layer number goes: parameters of this path are stacks of all layers. An expert's number goes
# behind EXPERTS, whose parameters are stacks of all layers' experts.
LAYERS, EXPERTS = "model.layers.", ".experts."
# Matrices that are no stacks. Whatever else is not of the layers shares a block with what is, and is a stack of one.
_PLAIN = ("model.embed_tokens.weight", "model.embed_positions.weight")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of the model.

    Attributes:
        name: its path in the module ("model.layers.self_attn.q_proj.weight").
        shape: as the programs take it; stacked ``[L, …]`` for what is in a layer.
        sources: the checkpoint tensors it is made of, in order, each filling one entry of the first axis;
            a single one fills it whole.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape of each of its sources in the checkpoint."""
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
    """A model without weights: its parameters in a fixed order, and how to bind arrays to them."""

    parameters: tuple[Parameter, ...]
    bind: Callable[[Sequence[Weight]], Decoder]


def abstract_model(spec: ModelSpec) -> AbstractModel:
    """Builds the module without allocating anything."""
    graph, state = nnx.split(nnx.eval_shape(lambda: spec.module(spec.config)))
    flat = sorted((".".join(map(str, path)), path, leaf) for path, leaf in nnx.to_flat_state(state))
    parameters = tuple(
        Parameter(name=name, shape=tuple(leaf.shape), sources=_sources(name, spec.config))
        for name, _, leaf in flat
    )

    def bind(arrays: Sequence[Weight]) -> Decoder:
        bound = [(path, leaf.replace(array)) for (_, path, leaf), array in zip(flat, arrays, strict=True)]
        return nnx.merge(graph, nnx.from_flat_state(bound))

    return AbstractModel(parameters=parameters, bind=bind)


def unknown_sources(parameters: Sequence[Parameter], found: Mapping[str, object]) -> list[str]:
    """Checkpoint tensors that no parameter is made of."""
    used = {source for p in parameters for source in p.sources}
    return sorted(set(found) - used)
