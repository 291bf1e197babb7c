"""Read generation_config.json: each known key is applied, ignored or refused.

The keys have the meaning that they have in transformers. The export ignores unknown keys, as transformers does, and
names them in a remark.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from precast.loaders.artifact.errors import PrecastError

from .files import plain_file, read_json

GENERATION_CONFIG = "generation_config.json"


class Treatment(Enum):
    """The three ways in which an export treats a key."""

    APPLIED = "applied"
    HARMLESS = "harmless"
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of transformers' `GenerationConfig`.

    Attributes:
        treatment: the way in which an export treats the key.
        target: for an applied key other than do_sample and eos_token_id, the field of the manifest's
            `SamplingDefaults` that the key sets.
        reason: for a harmless key, the reason to ignore it; for a refused key, its effect, as a clause that follows
            "which".
        neutral: for a refused key, values without an effect, which are accepted. Null is always accepted.
        sampling: True for a key that has an effect only if do_sample is true.
    """

    treatment: Treatment
    target: str = ""
    reason: str = ""
    neutral: tuple[object, ...] = ()
    sampling: bool = False


def _applied(*, sampling: bool = False, **targets: str) -> dict[str, Key]:
    return {
        key: Key(treatment=Treatment.APPLIED, target=target, sampling=sampling)
        for key, target in targets.items()
    }


def _harmless(reason: str, *keys: str) -> dict[str, Key]:
    return {key: Key(treatment=Treatment.HARMLESS, reason=reason) for key in keys}


def _refused(key: str, effect: str, *neutral: object, sampling: bool = False) -> dict[str, Key]:
    return {key: Key(treatment=Treatment.REFUSED, reason=effect, neutral=neutral, sampling=sampling)}


KEYS: Mapping[str, Key] = {
    **_applied(
        max_length="max_length",
        max_new_tokens="max_tokens",
        min_length="min_length",
        min_new_tokens="min_tokens",
        stop_strings="stop",
        repetition_penalty="repetition_penalty",
        no_repeat_ngram_size="no_repeat_ngram_size",
        bad_words_ids="bad_words_ids",
        suppress_tokens="suppress_tokens",
        begin_suppress_tokens="begin_suppress_tokens",
        do_sample="read_sampling",
        eos_token_id="eos_token_ids",
    ),
    **_applied(
        temperature="temperature",
        top_k="top_k",
        top_p="top_p",
        min_p="min_p",
        sampling=True,
    ),
    **_harmless(
        "it describes the origin of the file", "transformers_version", "_from_model_config", "_commit_hash"
    ),
    **_harmless("tokenizer.json determines whether a text begins with it", "bos_token_id"),
    **_harmless("sequences are generated one at a time, so there is no padding", "pad_token_id"),
    **_harmless("only encoder-decoder models use it", "decoder_start_token_id"),
    **_harmless(
        "it only affects a beam search, and num_beams above 1 is refused",
        "early_stopping",
        "length_penalty",
        "diversity_penalty",
    ),
    **_harmless("it scales all probabilities by the same factor", "renormalize_logits"),
    **_harmless("a NaN among the logits is an error here", "remove_invalid_values"),
    **_harmless("each call returns one answer", "num_return_sequences"),
    **_harmless(
        "it only adds to the results of generate()",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
    ),
    **_harmless(
        "it affects how transformers computes, not the result",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "low_memory",
        "prefill_chunk_size",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
    ),
    **_harmless(
        "it only affects drafts, and the model itself accepts or rejects each of their tokens",
        "use_mtp",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "prompt_lookup_num_tokens",
        "max_matching_ngram_size",
        "assistant_early_exit",
        "assistant_lookbehind",
        "target_lookbehind",
        "speculation_type",
    ),
    **_harmless("it needs a second model in the call", "assistant_ensemble_weight"),
    **_refused("is_assistant", "makes this a draft model for another model", False),
    **_refused("num_beams", "asks for a beam search", 1),
    **_refused("num_beam_groups", "asks for a beam search", 1),
    **_refused("constraints", "asks for a beam search", []),
    **_refused("force_words_ids", "asks for a beam search", []),
    **_refused("penalty_alpha", "asks for a contrastive search", 0),
    **_refused("dola_layers", "contrasts the logits of different layers"),
    **_refused("max_time", "limits the time of an answer"),
    **_refused("token_healing", "changes the end of the prompt", False),
    **_refused("guidance_scale", "runs the model twice for each token", 1),
    **_refused("sequence_bias", "changes logits", [], {}),
    **_refused("exponential_decay_length_penalty", "changes logits"),
    **_refused("watermarking_config", "changes logits"),
    **_refused("encoder_repetition_penalty", "changes the logits of the prompt's tokens", 1),
    **_refused("encoder_no_repeat_ngram_size", "forbids token sequences of the prompt", 0),
    **_refused("forced_bos_token_id", "forces the first token"),
    **_refused("forced_eos_token_id", "forces the last token"),
    **_refused("typical_p", "filters tokens by typicality", 1, sampling=True),
    **_refused("top_h", "filters tokens by their entropy", sampling=True),
    **_refused("epsilon_cutoff", "removes tokens below a probability", 0, sampling=True),
    **_refused("eta_cutoff", "removes tokens below a probability", 0, sampling=True),
}

# transformers' defaults of keys that are absent or null, if do_sample is true. All other options are off by default,
# both in transformers and in precast.
_SAMPLING_DEFAULTS: Mapping[str, object] = {"temperature": 1.0, "top_k": 50}
# transformers' default max_length. transformers also writes this default to files, so the value says nothing about the
# model, and the export ignores it.
_DEFAULT_MAX_LENGTH = 20
# In each pair the first key overrides the second.
_PREFERRED = (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length"))
_LISTS = frozenset({"bad_words_ids", "suppress_tokens", "begin_suppress_tokens"})
# Keys that also describe the model. `without_generation` keeps them.
_SHARED = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Generation settings from a model's files.

    Attributes:
        values: keys of transformers' `GenerationConfig` that are not null.
        sampling: sampling defaults, by field of the manifest's `SamplingDefaults`.
        remarks: one sentence that names the unknown keys; empty if there are none.
    """

    values: Mapping[str, object]
    sampling: Mapping[str, object]
    remarks: tuple[str, ...]


def read_generation(folder: Path, config: Mapping[str, object]) -> Generation:
    """Read generation_config.json or, if it is missing, the same keys in config.json, as transformers does.

    Raises:
        PrecastError: a key that changes the answers is not supported, or a value has the wrong type.
    """
    path = folder / GENERATION_CONFIG
    if plain_file(path):
        values = read_json(path)
    else:
        path, values = folder / "config.json", {key: config[key] for key in KEYS if key in config}
    values = {key: value for key, value in values.items() if value is not None}
    return Generation(
        values=values,
        sampling=read_sampling(path, values),
        remarks=_remarks(path, sorted(values.keys() - KEYS.keys())),
    )


def without_generation(config: Mapping[str, object]) -> dict[str, object]:
    """Return config.json without its generation settings."""
    return {key: value for key, value in config.items() if key not in KEYS or key in _SHARED}


def _remarks(path: Path, unknown: list[str]) -> tuple[str, ...]:
    if not unknown:
        return ()
    return (f"{path.name}: ignored these keys, as transformers' generate() does: {', '.join(unknown)}",)


def read_sampling(path: Path, values: Mapping[str, object]) -> dict[str, object]:
    """Return the sampling defaults that `generate` of transformers would use.

    Args:
        path: the file, for error messages.
        values: the keys of the file that are not null.

    Returns:
        The defaults, by field of the manifest's `SamplingDefaults`.

    Raises:
        PrecastError: a key that changes the answers is not supported, or a value has the wrong type.
    """
    sampling = _do_sample(path, values)
    for key, value in values.items():
        if key in KEYS and (sampling or not KEYS[key].sampling):
            _check_refused(path, key, value)
    wanted = {**(_SAMPLING_DEFAULTS if sampling else {}), **values}
    if wanted.get("max_length") == _DEFAULT_MAX_LENGTH:
        del wanted["max_length"]
    for preferred, other in _PREFERRED:
        if preferred in wanted:
            wanted.pop(other, None)
    return {
        KEYS[key].target: _checked(path, key, value)
        for key, value in wanted.items()
        if _is_default(key) and (sampling or not KEYS[key].sampling) and value != []
    }


def _is_default(key: str) -> bool:
    known = KEYS.get(key)
    return (
        known is not None
        and known.treatment is Treatment.APPLIED
        and key not in ("do_sample", "eos_token_id")
    )


def _do_sample(path: Path, values: Mapping[str, object]) -> bool:
    value = values.get("do_sample", False)
    if not isinstance(value, bool):
        raise _wrong(path, "do_sample", "true or false", value)
    return value


def _check_refused(path: Path, key: str, value: object) -> None:
    known = KEYS[key]
    if known.treatment is not Treatment.REFUSED or value in known.neutral:
        return
    raise PrecastError(
        f"{path}: {key} is {value!r:.60}, which {known.reason}, but precast does not support that; remove the key to"
        " export the model without it."
    )


def _checked(path: Path, key: str, value: object) -> object:
    """Return `value` if it has the right type; the export checks its range later."""
    if key == "stop_strings":
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise _wrong(path, key, "a string or a list of strings", value)
        return tuple(texts)
    if key in _LISTS:
        if not isinstance(value, list):
            raise _wrong(path, key, "a list", value)
    elif not isinstance(value, int | float) or isinstance(value, bool):
        raise _wrong(path, key, "a number", value)
    return value


def _wrong(path: Path, key: str, expected: str, value: object) -> PrecastError:
    import json

    return PrecastError(
        f"{path}: expected {key} to be {expected}, found {json.dumps(value):.80}; correct it."
    )
