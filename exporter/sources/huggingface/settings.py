"""The keys of tokenizer_config.json: each is applied, harmless, or refused by name; any other is named to the user.

The reference is transformers 5.23: tokenizer.json defines the normaliser, pre-tokenizer, decoder and post-processor;
tokenizer_config.json defines added tokens, special tokens and chat templates.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from precast.loaders.artifact.errors import PrecastError

from ..files import optional_json

# Keys that huggingface_tokens, huggingface_templates and this file read, besides all that end in "_token".
APPLIED = frozenset(
    """
    added_tokens_decoder add_prefix_space additional_special_tokens auto_map chat_template
    clean_up_tokenization_spaces clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    extra_special_tokens fast_tokenizer_files fix_mistral_regex legacy model_specific_special_tokens
    split_special_tokens tokenizer_class
    """.split()
)
HARMLESS = frozenset(
    # Keys that transformers ignores if there is a tokenizer.json.
    """
    add_bos_token add_eos_token from_slow merges merges_file normalizer_file sp_model_kwargs spm_file tokenizer_file
    tokenizer_object unk_id vocab vocab_file vocab_size
    """.split()
    # About training, batches and lengths: one text is encoded whole, without padding.
    + """
    max_len max_length model_input_names model_max_length pad_to_multiple_of pad_token_type_id padding padding_side
    max_target_length return_tensors return_token_type_ids stride tokenizer_padding tokenizer_truncation truncation
    truncation_side truncation_strategy
    """.split()
    # About files, classes and messages of transformers.
    + """
    _commit_hash _from_auto backend chat_control_tokens device_map errors files_loaded init_inputs is_local
    local_files_only name_or_path processor_class response_schema response_template special_tokens_map_file
    tokenizer_type tokenizer_version transformers_version trust_remote_code use_fast verbose
    """.split()
    # Settings of one class of tokenizers; tokenizer.json holds what they do.
    + """
    clean_text do_basic_tokenize do_clean_text do_lower_case do_lowercase do_split_on_punc do_upper_case keep_accents
    legacy_behaviour max_input_chars_per_word never_split normalize_text remove_space
    spaces_between_special_tokens split_by_punct strip_accents tokenize_chinese_chars trim_offsets
    use_default_system_prompt wordpieces_prefix
    """.split()
)

_MISTRAL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"


def check_settings(path: Path, document: Mapping[str, Any]) -> tuple[str, ...]:
    """Refuse settings that would change tokenisation, and name the settings that are left out.

    Args:
        path: tokenizer_config.json, which may be missing.
        document: tokenizer.json.

    Raises:
        PrecastError: for a setting that a tokenizer.json cannot hold.
    """
    settings = optional_json(path)
    for key, refused in _REFUSED.items():
        if refused(settings.get(key), document):
            raise PrecastError(f"{path}: {_REASONS[key]}.")
    unknown = sorted(key for key in settings if key not in APPLIED | HARMLESS and not key.endswith("_token"))
    remarks = []
    if unknown:
        remarks.append(f"tokenizer_config.json: left out, as its meaning is unknown: {', '.join(unknown)}")
    if _cleans_up(settings, document):
        remarks.append(
            "tokenizer_config.json: left out: clean_up_tokenization_spaces, which takes spaces before punctuation"
            " out of answers"
        )
    return tuple(remarks)


def _brings_code(value: object, document: Mapping[str, Any]) -> bool:
    return value is not None


def _is_on(value: object, document: Mapping[str, Any]) -> bool:
    return bool(value)


def _names_another_file(value: object, document: Mapping[str, Any]) -> bool:
    """Return True if there is a tokenizer.json for other versions of transformers."""
    return value is not None and value != ["tokenizer.json"]


def _is_not_mended(value: object, document: Mapping[str, Any]) -> bool:
    """Return True if transformers would replace the pre-tokenizer of a large vocabulary."""
    return bool(value) and _MISTRAL not in _texts(document.get("pre_tokenizer"))


_REFUSED: Mapping[str, Callable[[object, Mapping[str, Any]], bool]] = {
    "auto_map": _brings_code,
    "split_special_tokens": _is_on,
    "fast_tokenizer_files": _names_another_file,
    "fix_mistral_regex": _is_not_mended,
}
_AGAIN = "save the tokenizer again (AutoTokenizer.from_pretrained(...).save_pretrained(...))"
_REASONS: Mapping[str, str] = {
    "auto_map": "auto_map asks for Python code that came with the checkpoint, which is never run; remove it where "
    "tokenizer.json alone does the same",
    "split_special_tokens": "split_special_tokens asks for special tokens to be cut like any text, chat markers "
    "included, which an artifact cannot do; set it to false",
    "fast_tokenizer_files": "fast_tokenizer_files names a tokenizer.json for each version of transformers; keep the "
    "newest as tokenizer.json and remove the key",
    "fix_mistral_regex": "fix_mistral_regex asks for another pre-tokenizer than tokenizer.json has; "
    + _AGAIN,
}


def _cleans_up(settings: Mapping[str, object], document: Mapping[str, Any]) -> bool:
    """Return True if transformers edits decoded text; with BPE it needs two settings for that."""
    forced = settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    is_bpe = (document.get("model") or {}).get("type") == "BPE"
    return bool(settings.get("clean_up_tokenization_spaces")) and (not is_bpe or bool(forced))


def _texts(part: object) -> str:
    """Yield all texts in a part of tokenizer.json."""
    if isinstance(part, dict):
        part = list(part.values())
    if isinstance(part, list):
        return "\n".join(map(_texts, part))
    return part if isinstance(part, str) else ""


# --- a space in front ---------------------------------------------------------------------------------------------

# transformers' classes that apply add_prefix_space; the others rely on tokenizer.json.
_BYTE_LEVEL = ("GPT2Tokenizer", "Qwen2Tokenizer")
_SENTENCEPIECE = ("LlamaTokenizer", "CodeLlamaTokenizer")


def with_prefix_space(path: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tokenizer.json that applies `add_prefix_space`, the setting for a space in front of a text.

    Args:
        path: tokenizer_config.json, which may be missing.
        document: tokenizer.json.

    Raises:
        PrecastError: the setting asks for a space, but tokenizer.json has no step that adds one.
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
            f"{path}: add_prefix_space asks for a space in front of a text, which tokenizer.json does not put;"
            f" {_AGAIN}."
        )
    return {**document, **{key: _without_prefix(document.get(key)) for key in _PIPELINE}}


_PIPELINE = ("normalizer", "pre_tokenizer", "decoder")


def _types(part: object) -> list[str]:
    """Yield the types of a step of tokenizer.json and of its nested steps."""
    if isinstance(part, list):
        return [kind for step in part for kind in _types(step)]
    if not isinstance(part, dict):
        return []
    return [str(part.get("type")), *(kind for value in part.values() for kind in _types(value))]


def _byte_level(part: Any, wanted: bool) -> Any:
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
    """Return a step of tokenizer.json without adding or removing a leading space; None if nothing is left."""
    if isinstance(part, list):
        return [left for left in map(_without_prefix, part) if left is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend" or (part.get("type") == "Strip" and part.get("start")):
        return None
    if part.get("type") == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    return {key: _without_prefix(value) for key, value in part.items()}
