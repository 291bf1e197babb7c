"""From a checkpoint's tensors to the artifact's weight file, one tensor at a time."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.weights import TensorSpec, write_weights

from .models.parameters import Parameter, unknown_sources
from .sources.base import Source, SourceTensor

# Buffers that old checkpoints carry and the config says again.
_IGNORED_ENDINGS = ("rotary_emb.inv_freq", "self_attn.masked_bias", "self_attn.bias")
_NAMED = 2  # of them, in a message


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """Which source tensors fill which parameters, checked before anything is written.

    Attributes:
        ignored: source tensors that are knowingly left out.
    """

    parameters: Sequence[Parameter]
    tensors: Mapping[str, SourceTensor]
    ignored: Sequence[str]

    def left_out(self) -> str | None:
        """What is left out, for people: the first names, and how many more; None where nothing is."""
        if not self.ignored:
            return None
        more = len(self.ignored) - _NAMED
        return f"leaving out {', '.join(self.ignored[:_NAMED])}" + (f", … ({more} more)" if more > 0 else "")


def plan_weights(source: Source, parameters: Sequence[Parameter], *, tied: bool) -> WeightPlan:
    """Matches a source's tensors with a model's parameters.

    Raises:
        PrecastError: for a tensor that is missing, has another shape, or belongs nowhere.
    """
    for parameter in parameters:
        for name in parameter.sources:
            _check_tensor(source, name, parameter.source_shape)
    if tied and "lm_head.weight" in source.tensors:
        _check_tied(source)
    left = unknown_sources(parameters, source.tensors)
    ignored = [
        name for name in left if name.endswith(_IGNORED_ENDINGS) or (tied and name == "lm_head.weight")
    ]
    if unknown := sorted(set(left) - set(ignored)):
        raise PrecastError(
            f"{source.name}: tensor {unknown[0]!r} belongs to no parameter of the model"
            f"{f' (nor do {len(unknown) - 1} more)' if len(unknown) > 1 else ''}; config and weights do not fit."
        )
    return WeightPlan(parameters=parameters, tensors=source.tensors, ignored=ignored)


def _check_tied(source: Source) -> None:
    """A checkpoint may say that its head is the embedding, and bring another; which is meant, only its owner knows."""
    head, embedding = (source.tensors[f"{name}.weight"].read() for name in ("lm_head", "model.embed_tokens"))
    if not np.array_equal(head, embedding):
        raise PrecastError(
            f"{source.name}: tie_word_embeddings is true, but lm_head.weight differs from the embedding; set it to"
            " false in config.json to use both, or remove lm_head.weight."
        )


def _check_tensor(source: Source, name: str, shape: tuple[int, ...]) -> None:
    tensor = source.tensors.get(name)
    if tensor is None:
        raise PrecastError(
            f"{source.name}: tensor {name!r} is missing; the config and the weights do not fit."
        )
    if tensor.shape != shape:
        raise PrecastError(
            f"{source.name}: tensor {name!r} has shape {list(tensor.shape)}, expected {list(shape)} by the config."
        )


def write_model_weights(
    path: Path, plan: WeightPlan, tables: Mapping[str, np.ndarray], report: Callable[[int], None]
) -> str:
    """Writes weights and tables; no more than one source tensor is in memory at a time.

    Args:
        path: file to write.
        plan: what fills what.
        tables: arrays that are computed, not read; written as they are.
        report: called with the bytes of each piece written.

    Returns:
        The file's sha256.

    Raises:
        PrecastError: when a tensor has values that are no numbers.
    """
    by_name = {p.name: p for p in plan.parameters}
    specs = [TensorSpec(name=p.name, shape=p.shape, dtype=np.dtype("<f4")) for p in plan.parameters]
    specs += [TensorSpec(name=n, shape=t.shape, dtype=t.dtype) for n, t in tables.items()]

    def parts(spec: TensorSpec) -> Iterable[np.ndarray]:
        if spec.name in tables:
            yield tables[spec.name]
            return
        for name in by_name[spec.name].sources:
            array = plan.tensors[name].read()
            _check_array(name, array, by_name[spec.name].source_shape)
            yield array
            report(array.nbytes)

    return write_weights(path, specs, parts)


def _check_array(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    # Of another shape but the same size, it would be written all the same, and in another order.
    if array.shape != shape:
        raise PrecastError(
            f"{name}: expected shape {list(shape)}, found {list(array.shape)} when reading it; the source's"
            " description of it is wrong: fetch the source again."
        )
    # A sum is not a number, or infinite, when any of its terms is; cheaper than a mask of the array.
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum(dtype=np.float64)
    if not np.isfinite(total):
        raise PrecastError(
            f"{name}: the tensor holds values that are not finite numbers; is the checkpoint damaged?"
        )
