"""Read tokenizer_config.json: each known key is applied, ignored or refused, and a remark names the unknown keys.

The keys have the meaning that they have in transformers 5.23. There, tokenizer.json defines the normaliser,
pre-tokenizer, decoder and post-processor, and tokenizer_config.json defines added tokens, special tokens and chat
templates.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from precast.loaders.artifact.errors import PrecastError

from ..files import optional_json

# Keys that tokens.py, templates.py and this file read, besides all that end in "_token".
APPLIED = frozenset(
    """
    added_tokens_decoder add_prefix_space additional_special_tokens auto_map chat_template
    clean_up_tokenization_spaces clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    extra_special_tokens fast_tokenizer_files fix_mistral_regex legacy model_specific_special_tokens
    split_special_tokens tokenizer_class
    """.split()
)
HARMLESS = frozenset(
    # transformers ignores these keys if there is a tokenizer.json.
    """
    add_bos_token add_eos_token from_slow merges merges_file normalizer_file sp_model_kwargs spm_file tokenizer_file
    tokenizer_object unk_id vocab vocab_file vocab_size
    """.split()
    # Keys about training, batches and lengths. The loader needs none: it encodes one whole text, without padding.
    + """
    max_len max_length model_input_names model_max_length pad_to_multiple_of pad_token_type_id padding padding_side
    max_target_length return_tensors return_token_type_ids stride tokenizer_padding tokenizer_truncation truncation
    truncation_side truncation_strategy
    """.split()
    # Keys about the files, classes and messages of transformers.
    + """
    _commit_hash _from_auto backend chat_control_tokens device_map errors files_loaded init_inputs is_local
    local_files_only name_or_path processor_class response_schema response_template special_tokens_map_file
    tokenizer_type tokenizer_version transformers_version trust_remote_code use_fast verbose
    """.split()
    # Settings of a single tokenizer class; tokenizer.json already includes their effect.
    + """
    clean_text do_basic_tokenize do_clean_text do_lower_case do_lowercase do_split_on_punc do_upper_case keep_accents
    legacy_behaviour max_input_chars_per_word never_split normalize_text remove_space
    spaces_between_special_tokens split_by_punct strip_accents tokenize_chinese_chars trim_offsets
    use_default_system_prompt wordpieces_prefix
    """.split()
)

# A part of the pattern with which transformers splits text if fix_mistral_regex is true.
_MISTRAL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"


def check_settings(path: Path, document: Mapping[str, Any]) -> tuple[str, ...]:
    """Return remarks on the ignored settings of tokenizer_config.json.

    Args:
        path: tokenizer_config.json, which may be missing.
        document: tokenizer.json.

    Raises:
        PrecastError: a setting changes tokenisation in a way that tokenizer.json cannot express.
    """
    settings = optional_json(path)
    for key, (is_refused, reason) in _REFUSED.items():
        if is_refused(settings.get(key), document):
            raise PrecastError(f"{path}: {key} {reason}.")
    unknown = sorted(key for key in settings if key not in APPLIED | HARMLESS and not key.endswith("_token"))
    remarks = []
    if unknown:
        remarks.append(
            f"tokenizer_config.json: ignored these keys, whose meaning is unknown: {', '.join(unknown)}"
        )
    if _cleans_up(settings, document):
        remarks.append(
            "tokenizer_config.json: ignored clean_up_tokenization_spaces, which removes spaces before punctuation"
            " from answers"
        )
    return tuple(remarks)


def _names_code(value: object, document: Mapping[str, Any]) -> bool:
    return value is not None


def _is_on(value: object, document: Mapping[str, Any]) -> bool:
    return bool(value)


def _names_another_file(value: object, document: Mapping[str, Any]) -> bool:
    """Return True if the key lists other files, which some versions of transformers read instead of tokenizer.json."""
    return value is not None and value != ["tokenizer.json"]


def _replaces_pre_tokenizer(value: object, document: Mapping[str, Any]) -> bool:
    """Return True if transformers would replace tokenizer.json's pre-tokenizer with Mistral's."""
    return bool(value) and _MISTRAL not in _texts(document.get("pre_tokenizer"))


_SAVE_AGAIN = "save the tokenizer again (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
# Keys that may be refused. Each has a function that returns True for a refused value, and the words that follow the key
# in the error.
_REFUSED: Mapping[str, tuple[Callable[[object, Mapping[str, Any]], bool], str]] = {
    "auto_map": (
        _names_code,
        "asks for the checkpoint's own code, which precast never runs; remove the key if tokenizer.json needs no code",
    ),
    "split_special_tokens": (
        _is_on,
        "splits special tokens, including chat markers, as plain text, which an artifact cannot do; set it to false",
    ),
    "fast_tokenizer_files": (
        _names_another_file,
        "lists files for several versions of transformers; rename the newest to tokenizer.json and remove the key",
    ),
    "fix_mistral_regex": (
        _replaces_pre_tokenizer,
        f"asks for a pre-tokenizer that tokenizer.json does not have; {_SAVE_AGAIN}",
    ),
}


def _cleans_up(settings: Mapping[str, object], document: Mapping[str, Any]) -> bool:
    """Return True if transformers would remove spaces from decoded text; for BPE, two keys must request that."""
    forced = settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    is_bpe = (document.get("model") or {}).get("type") == "BPE"
    return bool(settings.get("clean_up_tokenization_spaces")) and (not is_bpe or bool(forced))


def _texts(part: object) -> str:
    """Return all strings in a part of tokenizer.json, one per line."""
    if isinstance(part, dict):
        part = list(part.values())
    if isinstance(part, list):
        return "\n".join(map(_texts, part))
    return part if isinstance(part, str) else ""


# --- leading space ------------------------------------------------------------------------------------------------

# The classes of transformers that apply add_prefix_space. Other classes rely on tokenizer.json.
_BYTE_LEVEL = ("GPT2Tokenizer", "Qwen2Tokenizer")
_SENTENCEPIECE = ("LlamaTokenizer", "CodeLlamaTokenizer")


def with_prefix_space(path: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Apply the setting `add_prefix_space` (a space before each text) to a tokenizer.json, and return the result.

    Args:
        path: tokenizer_config.json, which may be missing.
        document: tokenizer.json.

    Raises:
        PrecastError: the setting asks for a space, but no step of tokenizer.json adds one.
    """
    settings = optional_json(path)
    wanted, name = settings.get("add_prefix_space"), str(settings.get("tokenizer_class")).removesuffix("Fast")
    if not isinstance(wanted, bool):
        return dict(document)
    if "ByteLevel" in _types(document.get("pre_tokenizer")):
        changed = _byte_level(document.get("pre_tokenizer"), wanted) if name in _BYTE_LEVEL else None
        return dict(document) if changed is None else {**document, "pre_tokenizer": changed}
    if name not in _SENTENCEPIECE or wanted == _has_prefix(document):
        return dict(document)
    if wanted:
        raise PrecastError(
            f"{path}: add_prefix_space asks for a space before each text, but no step of tokenizer.json adds one;"
            f" {_SAVE_AGAIN}."
        )
    return {**document, **{key: _without_prefix(document.get(key)) for key in _PIPELINE}}


_PIPELINE = ("normalizer", "pre_tokenizer", "decoder")


def _types(part: object) -> list[str]:
    """Return the types of a step of tokenizer.json and of its nested steps."""
    if isinstance(part, list):
        return [kind for step in part for kind in _types(step)]
    if not isinstance(part, dict):
        return []
    return [str(part.get("type")), *(kind for value in part.values() for kind in _types(value))]


def _byte_level(part: Any, wanted: bool) -> Any:
    """Return a copy of a pre-tokenizer whose byte-level step has `add_prefix_space` set to `wanted`."""
    if isinstance(part, list):
        return [_byte_level(step, wanted) for step in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "ByteLevel":
        return {**part, "add_prefix_space": wanted}
    return {key: _byte_level(value, wanted) for key, value in part.items()}


def _has_prefix(document: Mapping[str, Any]) -> bool:
    return any(document.get(key) != _without_prefix(document.get(key)) for key in _PIPELINE[:2])


def _without_prefix(part: Any) -> Any:
    """Return a step of tokenizer.json without the parts that add or strip a leading space; None if no part is left."""
    if isinstance(part, list):
        return [step for step in map(_without_prefix, part) if step is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend" or (part.get("type") == "Strip" and part.get("start")):
        return None
    if part.get("type") == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    return {key: _without_prefix(value) for key, value in part.items()}
