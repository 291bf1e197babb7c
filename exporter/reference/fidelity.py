"""The fidelity of an artifact: its predictions compared with those of its source in float32."""

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from precast.loaders.artifact.manifest import Fidelity
from precast.loaders.audit import evaluate
from precast.loaders.generation.model import Model
from precast.loaders.progress import Progress, silent
from precast.loaders.text.tokenizer import Tokenizer

from ..devices import on_cpu_in_float32
from ..models.parameters import abstract_model
from ..models.registry import ModelSpec, read_model
from ..sources.base import Source
from ..sources.open import open_source
from ..texts import read_tokenizer
from ..weights import plan_weights, read_floats
from .layerwise import LayerwiseReference

# Number of tokens that an export measures: two windows of 512 tokens, or more windows if the context is shorter.
TOKENS = 1024
# Number of tokens for a model of this many weights: two cores need more than a minute for its pass over 512 tokens.
_LARGE, _TOKENS_OF_LARGE = 2_000_000_000, 512


class Reference:
    """A scorer that runs the uncached float32 forward pass for all positions of a window at once.

    Args:
        name: name in messages.
        spec: the model.
        weights: float32 arrays by parameter name, in the shapes of the forward pass.
        tokenizer: the model's tokenizer.
        context: maximum length of a window, in positions.
        exported: context of the artifact to compare with, because some kinds of RoPE depend on the context. None
            means that these RoPEs use the length of each window instead, as in transformers.
    """

    def __init__(
        self,
        *,
        name: str,
        spec: ModelSpec,
        weights: Mapping[str, np.ndarray],
        tokenizer: Tokenizer,
        context: int,
        exported: int | None = None,
    ) -> None:
        model = abstract_model(spec)
        self.name, self.tokenizer, self.context, self.vocab = name, tokenizer, context, spec.config.vocab
        self._spec, self._exported = spec, exported
        self._width = 0
        self._forward = jax.jit(
            lambda tokens, cos, sin, *arrays: model.bind(arrays).forward(tokens[None], cos, sin)[0]
        )
        with on_cpu_in_float32():
            self._weights: list[Array] = [jnp.from_dlpack(weights[p.name]) for p in model.parameters]

    def logits(self, window: Sequence[int], first: int) -> Iterator[np.ndarray]:
        """Yield the logits ``[V]`` of every position of the window, from `first` to the last but one."""
        # Pad a short window to the length of the longest so far, to reuse the program compiled for that length. No
        # position attends to the padding.
        self._width = max(self._width, len(window))
        padded = np.zeros(self._width, np.int32)
        padded[: len(window)] = window
        tables = (self._fitted(t) for t in self._spec.tables(self._exported or len(window)))
        with on_cpu_in_float32():
            rows = np.asarray(self._forward(padded, *tables, *self._weights))  # [W, V]
        yield from rows[first : len(window) - 1]

    def _fitted(self, table: np.ndarray) -> np.ndarray:
        """Cut or pad a table ``[Z, S, P]`` to the length of the padded window; the padding has no effect."""
        missing = max(0, self._width - table.shape[1])
        return np.pad(table, ((0, 0), (0, missing), (0, 0)))[:, : self._width]


def read_weights(source: Source, spec: ModelSpec) -> dict[str, np.ndarray]:
    """Read a source's tensors in float32, as one array for each parameter of the forward pass.

    Raises:
        PrecastError: the tensors do not fit the model.
    """
    parameters = abstract_model(spec).parameters
    plan = plan_weights(spec.adapt(source), parameters, tied=spec.config.tied_embeddings)
    return {p.name: read_floats(plan.tensors, p, p.sources, p.shape) for p in parameters}


def open_reference(path: str, exported: int | None = None) -> Reference:
    """Open a Hugging Face directory or a .gguf file as a reference.

    Args:
        path: the directory or file.
        exported: as for `Reference`.

    Raises:
        PrecastError: the source cannot be read, or its model is not supported.
    """
    source = open_source(path)
    spec = read_model(source.config, source.name)
    return Reference(
        name=source.name,
        spec=spec,
        weights=read_weights(source, spec),
        tokenizer=read_tokenizer(source),
        context=spec.config.max_positions,
        exported=exported,
    )


def measure(
    model: Model,
    spec: ModelSpec,
    source: Source,
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    progress: Progress = silent,
) -> Fidelity | None:
    """Compare a finished artifact with its source in float32, on the text that precast ships.

    Args:
        model: the artifact, loaded.
        spec: the model.
        source: the source, whose tensors are read layer by layer for every window.
        weights: float32 arrays by parameter name, used instead of the source's tensors; None to read the tensors.
        progress: called with the number of predictions scored so far.

    Returns:
        The figures for the manifest; None if the context is too small for a window.

    Raises:
        PrecastError: logits of the artifact or the reference are not finite.
    """
    artifact = evaluate.ArtifactScorer(model=model)
    window = min(evaluate.DEFAULT_WINDOW, artifact.context)
    size = sum(p.size for p in abstract_model(spec).parameters)
    tokens = TOKENS if size < _LARGE else _TOKENS_OF_LARGE
    text = evaluate.read_text(evaluate.SHIPPED_TEXT, tokens)
    windows = evaluate.cut(evaluate.tokenize(model.tokenizer, text), tokens, window)
    if window < evaluate.SMALLEST_WINDOW or not windows:
        return None
    name, tokenizer, context = f"{source.name} in float32", model.tokenizer, artifact.context
    reference: evaluate.Scorer
    if weights is None:
        reference = LayerwiseReference(
            name=name, spec=spec, source=source, tokenizer=tokenizer, context=context
        )
    else:
        reference = Reference(
            name=name, spec=spec, weights=weights, tokenizer=tokenizer, context=context, exported=context
        )
    scores = evaluate.evaluate(artifact, windows, reference, progress)
    return _fidelity(evaluate.SHIPPED_TEXT.name, scores)


def _fidelity(text: str, scores: evaluate.Scores) -> Fidelity:
    found = scores.comparison
    assert found is not None  # `evaluate` compares whenever it is given a reference
    return Fidelity(
        text=text,
        tokens=scores.tokens,
        perplexity=scores.perplexity,
        reference_perplexity=found.perplexity,
        kl_mean=found.kl_mean,
        kl_p99=found.kl_p99,
        top1=found.top1,
    )
