"""What nearly all configs say in the same words."""

from collections.abc import Mapping, Sequence

from precast.loaders.artifact.errors import PrecastError

from .blocks import DecoderConfig, Mixture
from .config import ConfigReader

# transformers' names of the activations that there are. Its approximations of GELU by a tanh are one formula, written
# in several ways.
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Far above any existing model. Every layer and expert has its own tensor names, and every H its own tables.
MOST_LAYERS = MOST_EXPERTS = 1024
_MOST_HEAD_DIM = 1 << 16

# What transformers calls layers whose tokens see all positions, and those whose tokens see the last of them.
FULL, SLIDING = "full_attention", "sliding_attention"


def read_shape(
    config: ConfigReader,
    *,
    max_positions: int,
    norm_eps: float = 1e-6,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    tied: bool = False,
) -> DecoderConfig:
    """Reads sizes, activation, epsilon and whether embeddings are tied; the rest is as `DecoderConfig` has it.

    Args:
        config: whose keys are taken.
        max_positions: where the config has none, as all that follow.
        norm_eps: of the norms.
        kv_heads: K; None for as many as there are query heads, which null always means.
        head_dim: H; None for the width divided among the query heads.
        tied: whether the output head is the embedding.

    Raises:
        PrecastError: for a size that is missing, and for a value that is not understood.
    """
    heads = config.take_size("num_attention_heads")
    width = config.take_size("hidden_size")
    every = kv_heads is None or config.is_null("num_key_value_heads")
    return DecoderConfig(
        layers=config.take_size("num_hidden_layers", most=MOST_LAYERS),
        width=width,
        heads=heads,
        kv_heads=config.take_size("num_key_value_heads", heads if every else kv_heads),
        head_dim=config.take_size("head_dim", head_dim or max(width // heads, 1), most=_MOST_HEAD_DIM),
        ff_width=config.take_size("intermediate_size"),
        vocab=config.take_size("vocab_size"),
        max_positions=config.take_size("max_position_embeddings", max_positions),
        norm_eps=config.take_finite("rms_norm_eps", norm_eps),
        tied_embeddings=config.take_bool("tie_word_embeddings", tied),
        activation=config.take_choice("hidden_act", ACTIVATIONS, "silu"),
    )


def read_mixture(config: ConfigReader, *, experts: int, chosen: int, renormalised: bool) -> Mixture:
    """Reads how many experts there are and how many of them a token goes through, which are the defaults given.

    Raises:
        PrecastError: for numbers that do not go together.
    """
    names = ("num_experts", "num_local_experts")  # transformers takes one for the other
    found = [
        config.take_size(name, most=MOST_EXPERTS) for name in names if config.peek(name) is not None
    ] or [experts]
    if len(set(found)) > 1:
        raise PrecastError(
            f"{config.where}: {' and '.join(names)} disagree: {' and '.join(map(str, found))}."
        )
    mixture = Mixture(
        experts=found[0],
        chosen=config.take_size("num_experts_per_tok", chosen),
        renormalised=renormalised,
    )
    if mixture.chosen > mixture.experts:
        raise config.wrong(
            "num_experts_per_tok", f"not more than the {mixture.experts} experts", mixture.chosen
        )
    return mixture


def same_window(window: int | None, layers: int) -> tuple[int, ...]:
    """Windows of layers that see equally far; None for all positions."""
    return () if window is None else (window,) * layers


def read_windows(config: ConfigReader, window: int | None, types: Sequence[str]) -> tuple[int, ...]:
    """The window of each layer, by ``layer_types``.

    Args:
        config: whose ``layer_types`` are taken.
        window: of the layers that have one; None where none may.
        types: of the layers, where the config has no ``layer_types``.

    Raises:
        PrecastError: for types of other kinds or another number, and for a window where there is none.
    """
    found = config.take("layer_types", list(types))
    if (
        not isinstance(found, list)
        or len(found) != len(types)
        or any(t not in (FULL, SLIDING) for t in found)
    ):
        raise config.wrong("layer_types", f"{FULL} or {SLIDING} for each of {len(types)} layers", found)
    if SLIDING not in found:
        return ()
    if window is None:
        raise PrecastError(
            f"{config.where}: 'layer_types' has {SLIDING}, but the config has no 'sliding_window' in use; expected"
            " both or neither."
        )
    return tuple(window if t == SLIDING else 0 for t in found)


def check_layer_types(config: ConfigReader, shape: DecoderConfig) -> None:
    """Check `layer_types` for an architecture that does not read it; newer configs contain the key anyway.

    Raises:
        PrecastError: the types differ from the model's layers.
    """
    found = config.take("layer_types")
    types = [SLIDING if window else FULL for window in shape.windows or (0,) * shape.layers]
    if found is not None and found != types:
        raise PrecastError(
            f"{config.where}: 'layer_types' is {found!r:.80}, but transformers gives all {shape.layers} layers of this"
            f" architecture {types[0]}; remove the key, or correct it."
        )
