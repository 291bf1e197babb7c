"""GPT-2 (Radford et al. 2019): learned positions, LayerNorms, a plain MLP, biases everywhere."""

from flax import nnx
from jax import Array

from ...sources.base import SourceTensor
from ..blocks import MLP, Attention, DecoderConfig, LayerNorm
from ..config import ConfigReader
from ..ops import Calls
from ..rope import Rope, no_rope
from ..shape import ACTIVATIONS, MOST_LAYERS
from ..tensors import Tensors, split_rows, take, transposed

# Keys about a head that pooled texts for other tasks, those that are said otherwise too, and of first versions.
_UNUSED = """
    _num_labels attn_pdrop n_ctx n_special output_past predict_special_tokens reorder_and_upcast_attn
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
""".split()
# Masks that were once stored as if they were weights.
_MASKS = (".attn.bias", ".attn.masked_bias")


def read_config(config: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Reads a ``model_type: gpt2`` config.

    Raises:
        PrecastError: for a key that changes the maths and is not understood.
    """
    for key in _UNUSED:
        config.take(key)
    config.expect("add_cross_attention", False)
    config.expect("scale_attn_by_inverse_layer_idx", False)
    width, heads = config.take_size("n_embd"), config.take_size("n_head")
    if width % heads:
        raise config.wrong("n_head", f"a divisor of n_embd, which is {width}", heads)
    shape = DecoderConfig(
        layers=config.take_size("n_layer", most=MOST_LAYERS),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        ff_width=config.take_size("n_inner", 4 * width),
        vocab=config.take_size("vocab_size"),
        max_positions=config.take_size("n_positions", 1024),
        norm_eps=config.take_finite("layer_norm_epsilon", 1e-5),
        tied_embeddings=config.take_bool("tie_word_embeddings", True),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        activation=config.take_choice("activation_function", ACTIVATIONS, "gelu_new"),
        attention_scale=None if config.take_bool("scale_attn_weights", True) else 1.0,
        learned_positions=True,
        gated=False,
    )
    return shape, (no_rope(shape.head_dim),)


class GPT2Layers(nnx.Module):
    """All L layers: what goes into attention and MLP is normed, what comes out is added."""

    def __init__(self, c: DecoderConfig) -> None:
        self.input_layernorm = LayerNorm(c.layers, c.width, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = LayerNorm(c.layers, c.width, c.norm_eps)
        self.mlp = MLP(c)

    def __call__(self, x: Array, calls: Calls) -> Array:
        """Runs one layer: x ``[R, T, D]`` to ``[R, T, D]``."""
        x = self.self_attn(x, calls, norm=self.input_layernorm, residual=x)
        return self.mlp(x, calls, norm=self.post_attention_layernorm, residual=x)


def adapt(tensors: Tensors, c: DecoderConfig) -> Tensors:
    """Llama's names, matrices as ``[out, in]``, and q, k and v apart."""
    prefix = "transformer." if any(name.startswith("transformer.") for name in tensors) else ""
    # As Llama's old checkpoints call them, which are known to be no weights.
    left = {n.replace(".attn.", ".self_attn.") if n.endswith(_MASKS) else n: t for n, t in tensors.items()}
    made = {
        "model.embed_tokens.weight": take(left, f"{prefix}wte.weight", (c.vocab, c.width)),
        "model.embed_positions.weight": take(left, f"{prefix}wpe.weight", (c.max_positions, c.width)),
        **_pair(left, f"{prefix}ln_f", "model.norm", (c.width,)),
    }
    for i in range(c.layers):
        made |= _layer(left, f"{prefix}h.{i}.", f"model.layers.{i}.", c)
    return left | made


def _layer(left: dict[str, SourceTensor], old: str, new: str, c: DecoderConfig) -> dict[str, SourceTensor]:
    made = {
        **_pair(left, f"{old}ln_1", f"{new}input_layernorm", (c.width,)),
        **_pair(left, f"{old}ln_2", f"{new}post_attention_layernorm", (c.width,)),
        **_pair(left, f"{old}attn.c_proj", f"{new}self_attn.o_proj", (c.width, c.width)),
        **_pair(left, f"{old}mlp.c_fc", f"{new}mlp.up_proj", (c.width, c.ff_width)),
        **_pair(left, f"{old}mlp.c_proj", f"{new}mlp.down_proj", (c.ff_width, c.width)),
    }
    for kind, fused in _pair(left, f"{old}attn.c_attn", "", (c.width, 3 * c.width)).items():
        made |= split_rows(fused, {f"{new}self_attn.{part}_proj{kind}": c.width for part in "qkv"})
    return made


def _pair(
    left: dict[str, SourceTensor], old: str, new: str, shape: tuple[int, ...]
) -> dict[str, SourceTensor]:
    """Weight and bias of a module under another name; to a weight ``[D]``, being turned means nothing."""
    weight, bias = take(left, f"{old}.weight", shape), take(left, f"{old}.bias", shape[-1:])
    return {f"{new}.weight": transposed(weight), f"{new}.bias": bias}
