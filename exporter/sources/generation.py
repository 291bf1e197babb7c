"""generation_config.json: every key of transformers' `GenerationConfig` is applied, harmless or refused.

transformers' behaviour is the reference. A key that it does not know has no effect; the export names and omits it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from precast.loaders.artifact.errors import PrecastError

from .files import plain_file, read_json

GENERATION_CONFIG = "generation_config.json"


class Treatment(Enum):
    """How an export treats a key."""

    APPLIED = "applied"
    HARMLESS = "harmless"
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of transformers' `GenerationConfig`.

    Attributes:
        treatment: how an export treats the value.
        why: the reason for a harmless key; the words that follow "which" for a refused one; the destination for an
            applied one.
        neutral: values of a refused key, besides null, that change nothing.
        sampling: the key has no effect without do_sample.
    """

    treatment: Treatment
    why: str
    neutral: tuple[object, ...] = ()
    sampling: bool = False


def _applied(*, sampling: bool = False, **fields: str) -> dict[str, Key]:
    return {
        key: Key(treatment=Treatment.APPLIED, why=field, sampling=sampling) for key, field in fields.items()
    }


def _harmless(why: str, *keys: str) -> dict[str, Key]:
    return {key: Key(treatment=Treatment.HARMLESS, why=why) for key in keys}


def _refused(key: str, why: str, *neutral: object, sampling: bool = False) -> dict[str, Key]:
    return {key: Key(treatment=Treatment.REFUSED, why=why, neutral=neutral, sampling=sampling)}


# For each applied key: the field of `SamplingParams`, or the function that reads it.
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
    **_harmless("it says who wrote the file", "transformers_version", "_from_model_config", "_commit_hash"),
    **_harmless("the tokenizer puts it before a text", "bos_token_id"),
    **_harmless("one sequence is generated at a time, so nothing is padded", "pad_token_id"),
    **_harmless("only encoder-decoder models have it", "decoder_start_token_id"),
    **_harmless(
        "it only steers a beam search, and num_beams above 1 is refused",
        "early_stopping",
        "length_penalty",
        "diversity_penalty",
    ),
    **_harmless("it scales all probabilities alike", "renormalize_logits"),
    **_harmless("logits that are no numbers are an error here", "remove_invalid_values"),
    **_harmless("each call gives one answer", "num_return_sequences"),
    **_harmless(
        "it only adds to what generate() returns",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
    ),
    **_harmless(
        "it says how transformers computes, not what",
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
        "it only makes drafts, which the model itself accepts or not",
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
    **_refused("is_assistant", "makes the model the draft of another one", False),
    **_refused("num_beams", "is a beam search", 1),
    **_refused("num_beam_groups", "is a beam search", 1),
    **_refused("constraints", "is a beam search", []),
    **_refused("force_words_ids", "is a beam search", []),
    **_refused("penalty_alpha", "is a contrastive search", 0),
    **_refused("dola_layers", "contrasts the logits of layers"),
    **_refused("max_time", "ends answers by the clock"),
    **_refused("token_healing", "changes the end of the prompt", False),
    **_refused("guidance_scale", "runs the model twice a token", 1),
    **_refused("sequence_bias", "changes logits", [], {}),
    **_refused("exponential_decay_length_penalty", "changes logits"),
    **_refused("watermarking_config", "changes logits"),
    **_refused("encoder_repetition_penalty", "changes the logits of the prompt's tokens", 1),
    **_refused("encoder_no_repeat_ngram_size", "forbids sequences of the prompt", 0),
    **_refused("forced_bos_token_id", "forces the first token"),
    **_refused("forced_eos_token_id", "forces the last token"),
    **_refused("typical_p", "filters tokens by how typical they are", 1, sampling=True),
    **_refused("top_h", "filters tokens by their entropy", sampling=True),
    **_refused("epsilon_cutoff", "drops tokens below a probability", 0, sampling=True),
    **_refused("eta_cutoff", "drops tokens below a probability", 0, sampling=True),
}

# transformers' defaults if do_sample is true and a key is absent or null; options off there are off here too.
_SAMPLING_DEFAULTS: Mapping[str, object] = {"temperature": 1.0, "top_k": 50}
# transformers' default max_length, which is not specific to the model.
_UNSET_LENGTH = 20
# In each pair the first key overrides the second.
_PREFERRED = (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length"))
_LISTS = frozenset({"bad_words_ids", "suppress_tokens", "begin_suppress_tokens"})
# Keys that also describe the model.
_SHARED = frozenset({"bos_token_id", "eos_token_id", "pad_token_id"})


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Generation settings from a model's files.

    Attributes:
        values: keys of transformers' `GenerationConfig` that are not null.
        sampling: defaults by field of the manifest's `SamplingDefaults`.
        remarks: a sentence for each omitted key, which has no effect in transformers either.
    """

    values: Mapping[str, object]
    sampling: Mapping[str, object]
    remarks: tuple[str, ...]


def read_generation(folder: Path, config: Mapping[str, object]) -> Generation:
    """Read generation_config.json or, without it, the same keys in config.json, as transformers does.

    Raises:
        PrecastError: a key would change the answers in a way that precast does not know, or a value is of the wrong
            type.
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
    return (f"{path.name}: {', '.join(unknown)}: transformers' generate() ignores this, and so does precast",)


def read_sampling(path: Path, values: Mapping[str, object]) -> dict[str, object]:
    """Return the sampling defaults that transformers' `generate` would use.

    Args:
        path: the file, for messages.
        values: its keys that are not null.
    """
    sampling = _do_sample(path, values)
    for key, value in values.items():
        if key in KEYS and (sampling or not KEYS[key].sampling):
            _check_refused(path, key, value)
    wanted = {**(_SAMPLING_DEFAULTS if sampling else {}), **values}
    if wanted.get("max_length") == _UNSET_LENGTH:
        del wanted["max_length"]
    for preferred, other in _PREFERRED:
        if preferred in wanted:
            wanted.pop(other, None)
    return {
        KEYS[key].why: _typed(path, key, value)
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
        f"{path}: {key} is {value!r:.60}, which {known.why}, and precast does not do that; remove the key to export the"
        " model without it."
    )


def _typed(path: Path, key: str, value: object) -> object:
    """Refuse values of the wrong type; the export checks ranges."""
    if key == "stop_strings":
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise _wrong(path, key, "texts", value)
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
