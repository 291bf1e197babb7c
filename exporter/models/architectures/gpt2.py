"""GPT-2 (Radford et al. 2019): learned positions, LayerNorms, a plain MLP, biases everywhere."""

from flax import nnx
from jax import Array

from ...sources.base import SourceTensor
from ..blocks import MLP, Attention, DecoderConfig, LayerNorm
from ..common_keys import ACTIVATIONS, MOST_LAYERS
from ..config import ConfigReader
from ..ops import LayerOps
from ..rope import Rope, no_rope
from ..tensors import Tensors, split_rows, take, transpose

# Keys of output heads for other tasks, keys that early versions wrote, and keys that repeat other keys.
_UNUSED = """
    _num_labels attn_pdrop n_ctx n_special output_past predict_special_tokens reorder_and_upcast_attn
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
""".split()
# Attention masks, which old checkpoints store beside the weights.
_MASKS = (".attn.bias", ".attn.masked_bias")


def read_config(reader: ConfigReader) -> tuple[DecoderConfig, tuple[Rope, ...]]:
    """Read a ``model_type: gpt2`` config.

    Raises:
        PrecastError: a key has a value that is not supported.
    """
    for key in _UNUSED:
        reader.take(key)
    reader.expect("add_cross_attention", False)
    reader.expect("scale_attn_by_inverse_layer_idx", False)
    width, heads = reader.take_size("n_embd"), reader.take_size("n_head")
    if width % heads:
        raise reader.wrong("n_head", f"a divisor of n_embd, which is {width}", heads)
    config = DecoderConfig(
        layers=reader.take_size("n_layer", most=MOST_LAYERS),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        ff_width=reader.take_size("n_inner", 4 * width),
        vocab=reader.take_size("vocab_size"),
        max_positions=reader.take_size("n_positions", 1024),
        norm_eps=reader.take_finite("layer_norm_epsilon", 1e-5),
        tied_embeddings=reader.take_bool("tie_word_embeddings", True),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        activation=reader.take_choice("activation_function", ACTIVATIONS, "gelu_new"),
        attention_scale=None if reader.take_bool("scale_attn_weights", True) else 1.0,
        learned_positions=True,
        gated=False,
    )
    return config, (no_rope(config.head_dim),)


class GPT2Layers(nnx.Module):
    """All L layers, each with a LayerNorm before its attention and another before its MLP."""

    def __init__(self, c: DecoderConfig) -> None:
        self.input_layernorm = LayerNorm(c.layers, c.width, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = LayerNorm(c.layers, c.width, c.norm_eps)
        self.mlp = MLP(c)

    def __call__(self, x: Array, ops: LayerOps) -> Array:
        """Run one layer on x ``[R, T, D]`` and return its result ``[R, T, D]``."""
        x = self.self_attn(x, ops, norm=self.input_layernorm, residual=x)
        return self.mlp(x, ops, norm=self.post_attention_layernorm, residual=x)


def adapt(tensors: Tensors, config: DecoderConfig) -> Tensors:
    """Give tensors Llama's names, transpose matrices to ``[out, in]``, and split the fused q, k and v."""
    prefix = "transformer." if any(name.startswith("transformer.") for name in tensors) else ""
    # `plan_weights` ignores masks under the names that old Llama checkpoints use. Give GPT-2's masks such names.
    left = {n.replace(".attn.", ".self_attn.") if n.endswith(_MASKS) else n: t for n, t in tensors.items()}
    made = {
        "model.embed_tokens.weight": take(left, f"{prefix}wte.weight", (config.vocab, config.width)),
        "model.embed_positions.weight": take(
            left, f"{prefix}wpe.weight", (config.max_positions, config.width)
        ),
        **_pair(left, f"{prefix}ln_f", "model.norm", (config.width,)),
    }
    for i in range(config.layers):
        made |= _layer(left, f"{prefix}h.{i}.", f"model.layers.{i}.", config)
    return left | made


def _layer(
    left: dict[str, SourceTensor], old: str, new: str, config: DecoderConfig
) -> dict[str, SourceTensor]:
    """Return the tensors of a layer under Llama's names."""
    made = {
        **_pair(left, f"{old}ln_1", f"{new}input_layernorm", (config.width,)),
        **_pair(left, f"{old}ln_2", f"{new}post_attention_layernorm", (config.width,)),
        **_pair(left, f"{old}attn.c_proj", f"{new}self_attn.o_proj", (config.width, config.width)),
        **_pair(left, f"{old}mlp.c_fc", f"{new}mlp.up_proj", (config.width, config.ff_width)),
        **_pair(left, f"{old}mlp.c_proj", f"{new}mlp.down_proj", (config.ff_width, config.width)),
    }
    for kind, fused in _pair(left, f"{old}attn.c_attn", "", (config.width, 3 * config.width)).items():
        made |= split_rows(fused, {f"{new}self_attn.{part}_proj{kind}": config.width for part in "qkv"})
    return made


def _pair(
    left: dict[str, SourceTensor], old: str, new: str, shape: tuple[int, ...]
) -> dict[str, SourceTensor]:
    """Take the weight and the bias of module `old`, and return them under the name of module `new`.

    The weight is transposed to ``[out, in]``, unless a quantised checkpoint stores it so. Transposing has no effect on
    the weight ``[D]`` of a norm.
    """
    name = f"{old}.weight"
    is_linear = name in left and left[name].is_linear
    weight = take(left, name, shape[::-1]) if is_linear else transpose(take(left, name, shape))
    return {f"{new}.weight": weight, f"{new}.bias": take(left, f"{old}.bias", shape[-1:])}
