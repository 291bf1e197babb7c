"""Special and added tokens from the five places that may define them: ids and texts equal those of transformers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from precast.exporter.sources.huggingface.settings import APPLIED, HARMLESS
from precast.exporter.sources.huggingface.tokenizer import read_tokenizer
from precast.loaders.artifact.errors import PrecastError

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Only "<a>" and "new" are in the vocabulary.
MARKS = ("<a>", "new", "<b>", "<d e>")
TEXTS = (
    "<a>",
    "x <a> y",
    "x<a>y  <a>\n z",
    "  <b>  <c>",
    "the<d e> <d e>",
    "<A>A<a>",
    "hello new news renew",
    "<a><b><c>",
    "",
)
LIBRARY = "PreTrainedTokenizerFast"
NORMALIZERS = {
    "none": lambda: None,
    "lower case": normalizers.Lowercase,
    "spaces": lambda: normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
}


def document(normalizer: str = "none", added: tuple[AddedToken, ...] = ()) -> dict[str, Any]:
    """Make a tokenizer.json of letters, with `added` tokens."""
    letters = [*"abcdefghijklmnopqrstuvwxyzA<>/▁ \n", "ne", "new"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<a>", *letters])}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, [("n", "e"), ("ne", "w")], unk_token="<unk>"))
    library.normalizer, library.decoder = NORMALIZERS[normalizer](), decoders.Fuse()
    library.add_tokens(list(added))
    return json.loads(library.to_str())


def write(folder: Path, **files: Any) -> Path:
    files = {"config": {"model_type": "llama"}, **files}
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def compare(folder: Path, *, texts: tuple[str, ...] = TEXTS, decoded: bool = True) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, read = transformers.AutoTokenizer.from_pretrained(folder), read_tokenizer(folder)
    ours = tokenizers.Tokenizer.from_buffer(read.data)
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text).ids == ids, text
        for skip in (True, False) if decoded else ():
            found = ours.decode(ids, skip_special_tokens=skip)
            assert found == theirs.decode(ids, skip_special_tokens=skip), text
    assert dict(read.tokens.named) == theirs.special_tokens_map


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, **dict.fromkeys(FLAGS, False), **flags}


# --- each place alone ---------------------------------------------------------------------------------------------


def _places(mark: str, flags: dict[str, bool], number: int) -> dict[str, dict[str, Any]]:
    """Return, for each place that may define a token, the files beside tokenizer.json."""
    full, config = token(mark, **flags), {"tokenizer_class": LIBRARY}
    typed = {"__type": "AddedToken", **full}
    return {
        "added_tokens_decoder": {"tokenizer_config": {**config, "added_tokens_decoder": {str(number): full}}},
        "added_tokens.json": {"tokenizer_config": config, "added_tokens": {mark: number}},
        "a name": {"tokenizer_config": {**config, "eos_token": typed}},
        "a name as text": {"tokenizer_config": {**config, "pad_token": mark}},
        "a name of its own": {"tokenizer_config": {**config, "image_token": mark}},
        "names of their own": {"tokenizer_config": {**config, "extra_special_tokens": {"x_token": mark}}},
        "additional": {"tokenizer_config": {**config, "additional_special_tokens": [mark]}},
        "extra": {"tokenizer_config": {**config, "extra_special_tokens": [typed]}},
        "map": {"tokenizer_config": config, "special_tokens_map": {"eos_token": full}},
        "map as text": {"tokenizer_config": config, "special_tokens_map": {"bos_token": mark}},
        "map alone": {"special_tokens_map": {"additional_special_tokens": [mark]}},
        "map and file": {
            "tokenizer_config": {**config, "extra_special_tokens": [mark]},
            "special_tokens_map": {"extra_special_tokens": ["<c>"]},
            "added_tokens": {mark: number},
        },
    }


PLACES = _places("", {}, 0)
FLAGGED = ("added_tokens_decoder", "a name", "extra", "map")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_token_from_any_place_is_as_in_transformers(tmp_path, place, normalizer):
    doc = document(normalizer)
    following = len(doc["model"]["vocab"])
    for index, mark in enumerate(MARKS[:3]):
        for flag in (None, *FLAGS) if place in FLAGGED else (None,):
            number = doc["model"]["vocab"].get(mark, following)
            files = _places(mark, {} if flag is None else {flag: True}, number)[place]
            folder = tmp_path / f"{index} {flag}"
            folder.mkdir()
            compare(write(folder, tokenizer=doc, **files))


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("value", [True, False])
def test_added_tokens_decoder_overrules_a_flag_of_tokenizer_json(tmp_path, flag, value):
    first = AddedToken("<a>", **{**dict.fromkeys(FLAGS, False), flag: not value})
    decoder = {"3": token("<a>", **{flag: value})}
    config = {"tokenizer_class": LIBRARY, "added_tokens_decoder": decoder}
    compare(write(tmp_path, tokenizer=document(added=(first,)), tokenizer_config=config))


# --- combinations of places ---------------------------------------------------------------------------------------


def _any_token(rng: random.Random) -> dict[str, Any]:
    return token(rng.choice(MARKS), **{flag: rng.random() < 0.5 for flag in FLAGS})


def _any_value(rng: random.Random) -> Any:
    if rng.random() < 0.6:
        return rng.choice([*MARKS, "<s>", "</s>", "<z>"])
    return {"__type": "AddedToken", **_any_token(rng)}


def _any_config(rng: random.Random, numbers: dict[str, int]) -> dict[str, Any]:
    config: dict[str, Any] = {"tokenizer_class": LIBRARY}
    if rng.random() < 0.5:
        some = [_any_token(rng) for _ in range(rng.randint(0, 4))]
        config["added_tokens_decoder"] = {str(numbers[t["content"]]): t for t in some}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token", "image_token"):
        if rng.random() < 0.3:
            config[key] = _any_value(rng)
    key = rng.choice(["additional_special_tokens", "extra_special_tokens"])
    if rng.random() < 0.4:
        config[key] = [_any_value(rng) for _ in range(rng.randint(0, 3))]
    elif rng.random() < 0.3:
        config["extra_special_tokens"] = {"foo_token": rng.choice(MARKS), "bar_token": "<q>"}
    for key in ("add_bos_token", "add_eos_token", "add_prefix_space"):
        if rng.random() < 0.2:
            config[key] = rng.random() < 0.5
    return config


def _any_map(rng: random.Random) -> dict[str, Any]:
    said: dict[str, Any] = {}
    for key in ("bos_token", "eos_token", "pad_token", "audio_token"):
        if rng.random() < 0.4:
            said[key] = rng.choice([rng.choice(MARKS), _any_token(rng)])
    if rng.random() < 0.4:
        said[rng.choice(["additional_special_tokens", "extra_special_tokens"])] = rng.sample(MARKS, 2)
    return said


@pytest.mark.parametrize("seed", range(60))
def test_precedence_of_contradicting_places(tmp_path, seed):
    rng = random.Random(seed)
    first = [_any_token(rng) for _ in range(rng.randint(0, 3))]
    doc = document(rng.choice(list(NORMALIZERS)), tuple(AddedToken(**entry) for entry in first))
    numbers = doc["model"]["vocab"] | {entry["content"]: entry["id"] for entry in doc["added_tokens"]}
    for mark in MARKS:
        numbers.setdefault(mark, max(numbers.values()) + 1)
    files = {
        "tokenizer_config": _any_config(rng, numbers) if rng.random() < 0.9 else None,
        "special_tokens_map": _any_map(rng) if rng.random() < 0.4 else None,
        "added_tokens": {m: numbers[m] for m in rng.sample(MARKS, 2)} if rng.random() < 0.4 else None,
    }
    # If a token's flag `normalized` changes, a tokenizer in memory still uses the old value to decode, but a reloaded
    # tokenizer uses the new value.
    plain = doc["normalizer"] is None or not any(entry["normalized"] for entry in first)
    compare(write(tmp_path, tokenizer=doc, **files), decoded=plain)


def test_the_ids_without_transformers(tmp_path):
    config = {
        "added_tokens_decoder": {
            "3": token("<a>", special=True, lstrip=True),
            "100": token("<b>", special=True),
        },
        "eos_token": "<b>",
        "additional_special_tokens": ["<c>"],
    }
    doc = document()
    read = read_tokenizer(write(tmp_path, tokenizer=doc, tokenizer_config=config))
    ours = tokenizers.Tokenizer.from_buffer(read.data)
    following = len(doc["model"]["vocab"])
    assert ours.encode("  <a><b><c>").ids == [3, following, following + 1]
    assert ours.decode([3, 4, following, following + 1]) == "a"
    assert read.tokens.named == {"eos_token": "<b>"}
    assert {key: read.document[key] for key in doc if key != "added_tokens"} == {
        key: doc[key] for key in doc if key != "added_tokens"
    }


def test_a_complete_tokenizer_json_stays_unchanged(tmp_path):
    folder = write(tmp_path, tokenizer=document(added=(AddedToken("<a>", special=True),)))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<a>"}')
    assert read_tokenizer(folder).data == (folder / "tokenizer.json").read_bytes()


# --- leading space ------------------------------------------------------------------------------------------------


def _sentencepiece(normalizer: str = "spaces") -> dict[str, Any]:
    doc = document(normalizer)
    doc["model"]["byte_fallback"] = doc["model"]["fuse_unk"] = True
    doc["decoder"] = json.loads(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ).__getstate__()
    )
    return doc


def _metaspace() -> dict[str, Any]:
    step = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return {**_sentencepiece("none"), "pre_tokenizer": json.loads(step.__getstate__())}


def _byte_level() -> dict[str, Any]:
    doc = document()
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *pre_tokenizers.ByteLevel.alphabet()])}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return {**doc, **json.loads(library.to_str())}


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("LlamaTokenizer", _metaspace),
        ("LlamaTokenizerFast", _metaspace),
        ("GPT2Tokenizer", _byte_level),
        ("GPT2TokenizerFast", _byte_level),
        (LIBRARY, _byte_level),
        (LIBRARY, _sentencepiece),
        (None, _byte_level),
    ],
)
def test_add_prefix_space(tmp_path, wanted, name, make):
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>", "add_prefix_space": wanted}
    config |= {} if name is None else {"tokenizer_class": name}
    texts = ("new", " new", "a new\n b", "")
    compare(write(tmp_path, tokenizer=make(), tokenizer_config=config), texts=texts)


def test_add_prefix_space_off_removes_the_step_of_a_normaliser(tmp_path):
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "unk_token": "<unk>"}
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    compare(
        write(tmp_path, tokenizer=_sentencepiece(), tokenizer_config=config | named),
        texts=("new", " new", ""),
    )


def test_add_prefix_space_without_a_step_that_adds_one(tmp_path):
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": True}
    folder = write(tmp_path, tokenizer=document(), tokenizer_config=config)
    with pytest.raises(PrecastError) as caught:
        read_tokenizer(folder)
    assert str(caught.value) == (
        f"{folder / 'tokenizer_config.json'}: add_prefix_space asks for a space before each text, but no step "
        "of tokenizer.json adds one; save the tokenizer again (AutoTokenizer.from_pretrained(...)"
        ".save_pretrained(...))."
    )


# --- every key ----------------------------------------------------------------------------------------------------


def test_every_key_that_transformers_reads_is_known():
    """Each key in transformers' code must be applied, be known as harmless, or end in "_token"."""
    import ast

    transformers = pytest.importorskip("transformers")
    root = Path(transformers.__file__).parent
    files = [root / "tokenization_utils_base.py", root / "tokenization_utils_tokenizers.py"]
    classes = [
        root / "models" / f"{name}/tokenization_{name}.py" for name in ("llama", "gemma", "qwen2", "gpt2")
    ]
    keys = {"tokenizer_class"}
    for node in ast.walk(ast.Module([ast.parse(path.read_text()) for path in files], [])):  # type: ignore[arg-type]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            owner, name = node.func.value, node.args[0]
            if (
                isinstance(owner, ast.Name)
                and owner.id in ("init_kwargs", "kwargs")
                and isinstance(name, ast.Constant)
            ):
                keys.add(str(name.value))
    for path in classes:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                keys |= {argument.arg for argument in node.args.args} - {"self"}
    # Arguments of other methods in the same files: methods that download, save or pad.
    keys -= set(
        """_from_pipeline proxies subfolder revision token cache_dir force_download gguf_file commit_message repo_id
        use_source_tokenizer tokenizer post_processor _json_padding _json_truncation _spm_precompiled_charsmap
        save_jinja_files add_special_tokens return_tokens sanitize_control_tokens
        continuing_subword_prefix end_of_word_suffix initial_alphabet user_agent""".split()
    )
    assert {key for key in keys if not key.endswith("_token")} - APPLIED - HARMLESS == set()
    assert set() == APPLIED & HARMLESS


def test_a_remark_names_unknown_keys(tmp_path):
    config = {"fold_case": True, "odd": 1, "image_token": "<a>", "model_max_length": 5}
    read = read_tokenizer(write(tmp_path, tokenizer=document(), tokenizer_config=config))
    assert read.remarks == (
        "tokenizer_config.json: ignored these keys, whose meaning is unknown: fold_case, odd",
    )


@pytest.mark.parametrize(
    ("kind", "twice", "named"),
    [("BPE", False, False), ("BPE", True, True), ("Unigram", False, True)],
)
def test_clean_up_is_named_if_transformers_applies_it(tmp_path, kind, twice, named):
    doc = document()
    if kind == "Unigram":
        doc["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
    config = {"clean_up_tokenization_spaces": True}
    config["clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"] = twice
    remarks = read_tokenizer(write(tmp_path, tokenizer=doc, tokenizer_config=config)).remarks
    assert bool(remarks) == named
    assert (
        not named
        or "ignored clean_up_tokenization_spaces, which removes spaces before punctuation" in remarks[0]
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"split_special_tokens": True},
            "split_special_tokens splits special tokens, including chat markers, as plain text",
        ),
        (
            {"fast_tokenizer_files": ["tokenizer.4.0.json"]},
            "rename the newest to tokenizer.json and remove the key.",
        ),
        ({"fix_mistral_regex": True}, "asks for a pre-tokenizer that tokenizer.json does not have; save the"),
        ({"bos_token": 5}, "expected bos_token to be text, found 5; correct it."),
        (
            {"image_token": {"text": "x"}},
            'expected image_token to be a token with its content and flags, found {"te',
        ),
        (
            {"eos_token": {"content": "x", "lstrip": "no"}},
            "expected eos_token to be a token with its content and",
        ),
        (
            {"additional_special_tokens": "<a>"},
            'expected extra_special_tokens to be a list of tokens, found "<a>"',
        ),
        (
            {"additional_special_tokens": [3]},
            "expected extra_special_tokens to be text, found 3; correct it.",
        ),
        ({"extra_special_tokens": {"x": []}}, "expected x to be text, found []; correct it."),
        (
            {"added_tokens_decoder": [1]},
            "expected added_tokens_decoder to be an object, found [1]; correct it.",
        ),
        ({"added_tokens_decoder": {"a": {"content": "x"}}}, 'expected token ids, found "a"; correct it.'),
        (
            {"added_tokens_decoder": {"3": "<a>"}},
            "expected added_tokens_decoder to be a token with its content",
        ),
    ],
)
def test_refused_settings(tmp_path, config, said):
    folder = write(tmp_path, tokenizer=document(), tokenizer_config=config)
    with pytest.raises(PrecastError) as caught:
        read_tokenizer(folder)
    assert str(caught.value).startswith(f"{folder / 'tokenizer_config.json'}: ")
    assert said in str(caught.value)


def test_settings_that_are_off_are_not_refused(tmp_path):
    config = {
        "split_special_tokens": False,
        "fix_mistral_regex": False,
        "fast_tokenizer_files": ["tokenizer.json"],
    }
    assert read_tokenizer(write(tmp_path, tokenizer=document(), tokenizer_config=config)).remarks == ()


def test_an_added_token_whose_id_is_not_a_number(tmp_path):
    folder = write(tmp_path, tokenizer=document(), added_tokens={"<b>": "many"})
    with pytest.raises(PrecastError, match='expected token ids, found "many"; correct it'):
        read_tokenizer(folder)
