"""Keys of config.json that an architecture need not read itself.

Some of these keys are harmless. Others are accepted only with values that have no effect. The reference is
transformers, which ignores keys that its classes do not know.
"""

from collections.abc import Mapping
from dataclasses import dataclass

# Keys that do not affect a decoder's forward pass, grouped by purpose. Old config.json files also contain
# settings of generation_config.json, but `without_generation` has already removed most of them.
HARMLESS = frozenset(
    {
        # Origin of the file.
        "architectures",
        "_commit_hash",
        "finetuning_task",
        "is_llama_config",
        "license",
        "model_name",
        "model_type",
        "_name_or_path",
        "name_or_path",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "_unsloth_version",
        "unsloth_version",
        # Choice of implementation and devices for the same maths.
        "attention_implementation",
        "_attn_implementation",
        "attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "base_model_ep_plan",
        "base_model_pp_plan",
        "base_model_tp_plan",
        "cache_implementation",
        "chunk_size_feed_forward",
        "_experts_implementation",
        "experts_implementation",
        "_experts_implementation_internal",
        "flash_attention",
        "flash_attn",
        "_flash_attn_2_enabled",
        "fused_rms_norm",
        "gradient_checkpointing",
        "_post_init_done",
        "torchscript",
        "use_cache",
        "use_flash_attention",
        "use_flash_attention_2",
        "use_flash_attn",
        "use_fused_rms_norm",
        "use_gradient_checkpointing",
        "use_sdpa",
        # Types of the stored weights; the weight files state these themselves.
        "dtype",
        "torch_dtype",
        "use_bfloat16",
        # Training.
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_dropout",
        "classifier_dropout",
        "dropout",
        "embd_pdrop",
        "embedding_dropout",
        "ffn_dropout",
        "hidden_dropout",
        "hidden_dropout_prob",
        "initializer_range",
        "resid_pdrop",
        "residual_dropout",
        "router_z_loss_coef",
        "use_cut_cross_entropy",
        # Lengths of training texts and of the tokenizer; max_position_embeddings states the model's context length.
        "max_seq_len",
        "max_seq_length",
        "max_sequence_length",
        "model_max_length",
        "seq_len",
        "seq_length",
        # Tokens, and additional results of a call.
        "bos_token_id",
        "eos_token_id",
        "output_attentions",
        "_output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "tokenizer_class",
        # Settings of classifiers; a decoder's only head is the output head.
        "id2label",
        "label2id",
        "_num_labels",
        "num_labels",
        "problem_type",
        "task_specific_params",
        "tf_legacy_loss",
        # All supported models are decoders.
        "is_decoder",
    }
)


@dataclass(frozen=True, kw_only=True)
class UnsupportedKey:
    """A key whose effect is not supported; only values without an effect are accepted.

    Attributes:
        neutral: values without an effect.
        effect: the effect of other values, as words that follow "which" in an error.
    """

    neutral: tuple[object, ...]
    effect: str


def _unsupported(effect: str, *neutral: object) -> UnsupportedKey:
    return UnsupportedKey(neutral=neutral, effect=effect)


_OTHER_ATTENTION = "selects another kind of attention"
_OTHER_LAYERS = "changes the layers"

# This table applies only to keys that the architecture has not read.
UNSUPPORTED: Mapping[str, UnsupportedKey] = {
    "add_cross_attention": _unsupported("attends to an encoder", False),
    "alibi": _unsupported(_OTHER_ATTENTION, False),
    "attention_bias": _unsupported("adds biases that this architecture does not have", False),
    "cross_attention_hidden_size": _unsupported("attends to an encoder"),
    "fp32_residual_connection": _unsupported("changes the precision of the computation", False),
    "is_causal": _unsupported("lets tokens attend to later tokens", True),
    "is_encoder_decoder": _unsupported("describes an encoder-decoder model", False),
    "lm_head_bias": _unsupported("adds biases that this architecture does not have", False),
    "mlp_bias": _unsupported("adds biases that this architecture does not have", False),
    "num_nextn_predict_layers": _unsupported("adds layers that predict later tokens", 0),
    "parallel_attn": _unsupported(_OTHER_LAYERS, False),
    "per_layer_config": _unsupported(_OTHER_LAYERS, {}),
    "prefix": _unsupported("precedes every text", ""),
    "pretraining_tp": _unsupported("changes the order of sums", 1),
    "pruned_heads": _unsupported("removes heads", {}, []),
    "qk_layernorm": _unsupported(_OTHER_LAYERS, False),
    "rope_interleaved": _unsupported("rotates other pairs of dimensions", False),
    "tie_encoder_decoder": _unsupported("describes an encoder-decoder model", False),
    "use_bidirectional_attention": _unsupported("lets tokens attend to later tokens", False),
    "use_mrope": _unsupported("uses positions in three dimensions", False),
    "use_parallel_residual": _unsupported(_OTHER_LAYERS, False),
    "use_sliding_window": _unsupported(_OTHER_ATTENTION, False),
}
