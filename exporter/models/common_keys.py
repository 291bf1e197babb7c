"""Readers of the config.json keys that nearly all architectures share."""

from collections.abc import Mapping, Sequence

from precast.loaders.artifact.errors import PrecastError

from .blocks import DecoderConfig, Mixture
from .config import ConfigReader

# The supported activations by transformers' names. All names with gelu mean the tanh approximation of GELU.
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Limits far above any existing model, so that a wrong config cannot cause millions of tensor names or huge RoPE tables.
MOST_LAYERS = MOST_EXPERTS = 1024
_MOST_HEAD_DIM = 1 << 16

# transformers' names for layers with full attention and with a sliding window.
FULL, SLIDING = "full_attention", "sliding_attention"


def read_common_keys(
    reader: ConfigReader,
    *,
    max_positions: int,
    norm_eps: float = 1e-6,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    tied: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
) -> DecoderConfig:
    """Return a `DecoderConfig` with the values of the keys that nearly all configs share.

    The architecture sets the other fields, which have their default values here.

    Args:
        reader: the config.
        max_positions: default of the context length.
        norm_eps: default epsilon of the norms.
        kv_heads: default of K; None if K defaults to N. A null in the config always means N.
        head_dim: default of H; None for the width divided by the number of query heads.
        tied: True if the output head is the embedding by default.
        attention_bias: True if the architecture has the key ``attention_bias``.
        mlp_bias: True if the architecture has the key ``mlp_bias``.

    Raises:
        PrecastError: a size is missing, or a value is not supported.
    """
    heads = reader.take_size("num_attention_heads")
    width = reader.take_size("hidden_size")
    is_multi_head = kv_heads is None or reader.is_null("num_key_value_heads")
    has_attention_bias = attention_bias and reader.take_bool("attention_bias", False)
    return DecoderConfig(
        layers=reader.take_size("num_hidden_layers", most=MOST_LAYERS),
        width=width,
        heads=heads,
        kv_heads=reader.take_size("num_key_value_heads", heads if is_multi_head else kv_heads),
        head_dim=reader.take_size("head_dim", head_dim or max(width // heads, 1), most=_MOST_HEAD_DIM),
        ff_width=reader.take_size("intermediate_size"),
        vocab=reader.take_size("vocab_size"),
        max_positions=reader.take_size("max_position_embeddings", max_positions),
        norm_eps=reader.take_finite("rms_norm_eps", norm_eps),
        tied_embeddings=reader.take_bool("tie_word_embeddings", tied),
        qkv_bias=has_attention_bias,
        out_bias=has_attention_bias,
        mlp_bias=mlp_bias and reader.take_bool("mlp_bias", False),
        activation=reader.take_choice("hidden_act", ACTIVATIONS, "silu"),
    )


def read_mixture(
    reader: ConfigReader, *, experts: int, experts_per_token: int, renormalised: bool
) -> Mixture:
    """Read the sizes of a mixture of experts.

    Args:
        reader: the config.
        experts: default of E.
        experts_per_token: default number of experts for each token.
        renormalised: as in `ops.ExpertsCall`; the caller has read it from the config, or its architecture fixes it.

    Raises:
        PrecastError: the config has two different values of E, or more experts per token than experts.
    """
    names = ("num_experts", "num_local_experts")  # synonyms in transformers
    found = [
        reader.take_size(name, most=MOST_EXPERTS) for name in names if reader.peek(name) is not None
    ] or [experts]
    if len(set(found)) > 1:
        raise PrecastError(
            f"{reader.where}: expected {' and '.join(names)} to be equal, found {' and '.join(map(str, found))}; remove"
            " the wrong key."
        )
    mixture = Mixture(
        experts=found[0],
        experts_per_token=reader.take_size("num_experts_per_tok", experts_per_token),
        renormalised=renormalised,
    )
    if mixture.experts_per_token > mixture.experts:
        raise reader.wrong(
            "num_experts_per_tok",
            f"at most {mixture.experts} (the number of experts)",
            mixture.experts_per_token,
        )
    return mixture


def uniform_windows(window: int | None, layers: int) -> tuple[int, ...]:
    """Return `window` once for every layer; if it is None, return an empty tuple, which means full attention."""
    return () if window is None else (window,) * layers


def read_windows(reader: ConfigReader, window: int | None, types: Sequence[str]) -> tuple[int, ...]:
    """Return the window of each layer, which depends on the layer's type in ``layer_types``.

    Args:
        reader: the config.
        window: the window of sliding layers; None if the config has none.
        types: default of ``layer_types``.

    Raises:
        PrecastError: a type is unknown, the number of types is wrong, or a sliding layer has no window.
    """
    found = reader.take("layer_types", list(types))
    if (
        not isinstance(found, list)
        or len(found) != len(types)
        or any(t not in (FULL, SLIDING) for t in found)
    ):
        raise reader.wrong("layer_types", f"{FULL} or {SLIDING} for each of {len(types)} layers", found)
    if SLIDING not in found:
        return ()
    if window is None:
        raise PrecastError(
            f"{reader.where}: 'layer_types' contains {SLIDING!r}, but 'sliding_window' is unset or turned off; correct"
            " one of the two keys."
        )
    return tuple(window if t == SLIDING else 0 for t in found)


def check_layer_types(reader: ConfigReader, config: DecoderConfig) -> None:
    """If the architecture has not read `layer_types`, check that it agrees with the windows of the layers.

    Newer versions of transformers write this key for architectures that do not use it.

    Raises:
        PrecastError: the types differ from the layers of `config`.
    """
    found = reader.take("layer_types")
    types = [SLIDING if window else FULL for window in config.windows or (0,) * config.layers]
    if found is not None and found != types:
        raise PrecastError(
            f"{reader.where}: expected 'layer_types' to be {types[0]} for all {config.layers} layers, as in"
            f" transformers, found {found!r:.80}; remove or correct the key."
        )
