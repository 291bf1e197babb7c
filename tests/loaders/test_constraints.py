"""Constraints of single answers: parameters, vocabularies, sampling, and the model and command line that use them."""

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation.constraints import Constraint
from precast.loaders.generation.grammars import Grammars
from precast.loaders.generation.sampling import Sampler
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.generation.stopping import DeadEnd
from precast.loaders.text.tokenizer import Tokenizer
from precast.loaders.text.vocabulary_bytes import SPECIAL, drops_first_space, vocabulary_bytes

pytest.importorskip("llguidance")

CORPUS = ["the cat sat on the mat", '{"name": "cat", "age": 3}', "[1, 2, 3] yes no café 🦙"]
SPECIALS = ["<unk>", "<s>", "</s>"]
END = 2
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def byte_level() -> Library:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens(["<think>", "  "])
    return library


def sentencepiece(*, drops: bool) -> Library:
    """Return a tokenizer like Llama 2's, whose decoder drops the first space, or like Gemma's."""
    library = Library(models.BPE(unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=[*SPECIALS, *BYTES], limit_alphabet=30, show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if drops else steps)
    document = json.loads(library.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] not in BYTES]
    document["model"]["byte_fallback"] = True
    return Library.from_str(json.dumps(document))


FAMILIES: dict[str, Callable[[], Library]] = {
    "byte-level": byte_level,
    "llama": lambda: sentencepiece(drops=True),
    "gemma": lambda: sentencepiece(drops=False),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make_tokenizer(FAMILIES[request.param]())


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, padded(tokenizer), [END])


def make_tokenizer(library: Library) -> Tokenizer:
    return Tokenizer.from_json(
        library.to_str().encode(), chat_template=None, bos_token=None, eos_token="</s>"
    )


def padded(tokenizer: Tokenizer) -> int:
    """Return a vocabulary size that exceeds the tokenizer's, so that some ids have no token."""
    return tokenizer.vocab_size + 5


def start(grammars: Grammars, **given: Any) -> Constraint:
    text = SamplingParams(**given).constraint
    assert text is not None
    return grammars.start(text)


def allowed(constraint: Constraint) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")).tolist())


def random_answer(
    grammars: Grammars, tokenizer: Tokenizer, seed: int, longest: int = 300, **given: Any
) -> str:
    """Generate an answer from random logits that favour end tokens and quotes."""
    size = padded(tokenizer)
    params = SamplingParams(temperature=1.0, seed=seed, **given)
    assert params.constraint is not None
    sampler = Sampler(params, [], size, [END], constraint=grammars.start(params.constraint))
    rng, ids = np.random.default_rng(seed), [0]
    while ids[-1] != END:
        logits = rng.standard_normal(size, np.float32)
        logits[END] += 6
        ids.append(sampler.sample(logits))
        assert len(ids) < longest
    stream = tokenizer.stream()
    return "".join(stream.push(token) for token in ids[1:]) + stream.finish()


# --- vocabularies -------------------------------------------------------------------------------------------


def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer: Tokenizer) -> None:
    tokens = vocabulary_bytes(tokenizer, padded(tokenizer))
    assert len(tokens) == padded(tokenizer)
    assert tokens[:3] == [SPECIAL + name.encode() for name in SPECIALS]
    assert tokens[-1] == SPECIAL + b"<[%d]>" % (padded(tokenizer) - 1)
    text = 'the cat {"name": "café 🦙\n"}  x'
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(tokens[i] for i in ids).decode() == text
    for token, data in enumerate(tokens[: tokenizer.vocab_size]):
        if not data.startswith(SPECIAL):
            assert data == tokenizer.token_bytes(token)


def test_added_tokens_are_text_unless_they_are_spelt_like_marks() -> None:
    tokenizer = make_tokenizer(byte_level())
    assert vocabulary_bytes(tokenizer, tokenizer.vocab_size)[-2:] == [SPECIAL + b"<think>", b"  "]
    assert len(vocabulary_bytes(tokenizer, 7)) == 7


def test_a_decoder_that_drops_the_first_space_is_recognised() -> None:
    found = {}
    for name, make in FAMILIES.items():
        tokenizer = make_tokenizer(make())
        found[name] = drops_first_space(tokenizer, vocabulary_bytes(tokenizer, tokenizer.vocab_size))
    assert found == {"byte-level": False, "llama": True, "gemma": False}


def test_a_decoder_that_marks_the_ends_of_words_is_refused() -> None:
    library = byte_level()
    library.decoder = decoders.BPEDecoder("</w>")
    with pytest.raises(PrecastError) as refused:
        vocabulary_bytes(make_tokenizer(library), 10)
    assert str(refused.value) == (
        "tokenizer.json: a constrained answer needs a byte-level or SentencePiece decoder, found BPEDecoder; generate"
        " without a constraint."
    )


# --- answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_random_answers_satisfy_each_kind_of_constraint(
    grammars: Grammars, tokenizer: Tokenizer, seed: int
) -> None:
    person = json.loads(random_answer(grammars, tokenizer, seed, json_schema=PERSON))
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 5
    assert person["age"] <= 99
    expression = r" ?[a-cé🦙]{2,4}-[0-9]+x"
    assert re.fullmatch(expression, random_answer(grammars, tokenizer, seed, regex=expression))
    choices = ("yes", "no", "yes, but", 'a "quoted\n" one', " café 🦙")
    assert random_answer(grammars, tokenizer, seed, choice=choices) in choices
    numbers = 'start: "[" [number ("," number)*] "]"\nnumber: /-?[0-9]{1,3}/'
    assert re.fullmatch(r"\[(-?\d+(,-?\d+)*)?\]", random_answer(grammars, tokenizer, seed, grammar=numbers))


TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=3)
PLAIN = st.none() | st.booleans() | st.integers() | TEXTS
VALUES = st.recursive(
    PLAIN, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXTS, x, max_size=3), max_leaves=6
)


@settings(deadline=None, max_examples=60)
@given(data=VALUES, indent=st.sampled_from((None, 2)))
def test_json_mode_allows_any_object_token_by_token(data: Any, indent: int | None) -> None:
    text = json.dumps({"data": data}, indent=indent, ensure_ascii=False)
    constraint = start(JSON_MODE.grammars, json_schema={"type": "object"})
    for token in [*JSON_MODE.tokenizer.encode(text, add_special_tokens=False), END]:
        assert token in allowed(constraint)
        constraint.accept(token)
    assert constraint.is_complete


class JSON_MODE:  # hypothesis takes no fixture of a narrower scope than its own
    tokenizer = make_tokenizer(byte_level())
    grammars = Grammars(tokenizer, padded(tokenizer), [END])


def test_special_tokens_and_ids_without_a_token_are_never_allowed(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    constraint = start(grammars, regex="(?s:.*)")
    tokens = vocabulary_bytes(tokenizer, padded(tokenizer))
    special = {token for token, data in enumerate(tokens) if data.startswith(SPECIAL)}
    assert not (special - {END}) & allowed(constraint)


def test_a_grammar_may_name_special_tokens(grammars: Grammars) -> None:
    constraint = start(grammars, grammar='start: <s> "yes"')
    if 1 not in allowed(constraint):  # after the space that the decoder drops
        constraint.accept(min(allowed(constraint)))
    assert allowed(constraint) == {1}


def test_greedy_answers_are_the_likeliest_allowed_tokens(grammars: Grammars, tokenizer: Tokenizer) -> None:
    size = padded(tokenizer)
    params = SamplingParams(choice=("no",), logit_bias={5: 100.0}, repetition_penalty=1.5, top_k=1)
    assert params.constraint is not None
    sampler = Sampler(params, [5], size, [END], constraint=grammars.start(params.constraint))
    assert not sampler.is_greedy
    ids: list[int] = []
    while not ids or ids[-1] != END:
        ids.append(sampler.sample(np.arange(size, dtype=np.float32)))
    assert tokenizer.decode(ids) == "no"


def test_a_complete_answer_ends_below_min_tokens(grammars: Grammars, tokenizer: Tokenizer) -> None:
    assert random_answer(grammars, tokenizer, 1, choice=("yes",), min_tokens=50) == "yes"
    longer = random_answer(grammars, tokenizer, 1, regex="(ab)*", min_tokens=20)
    assert len(tokenizer.encode(longer, add_special_tokens=False)) >= 10


def test_forbidden_tokens_and_a_constraint_may_leave_nothing(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    size = padded(tokenizer)
    constraint = start(grammars, choice=("yes",))
    params = SamplingParams(choice=("yes",), suppress_tokens=tuple(allowed(constraint)))
    sampler = Sampler(params, [], size, [END], constraint=constraint)
    with pytest.raises(PrecastError) as refused:
        sampler.sample(np.zeros(size, np.float32))
    assert str(refused.value) == (
        "Sampling: suppress_tokens, bad_words_ids, no_repeat_ngram_size and min_tokens leave no token to choose within"
        " the constraint; relax one of them."
    )


def test_a_vocabulary_without_the_letter_is_a_dead_end() -> None:
    library = Library(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, []))
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(SPECIALS)
    small = Grammars(make_tokenizer(library), 5, [END])
    constraint = start(small, regex="ab*c|bb")
    assert allowed(constraint) == {3, 4}
    constraint.accept(3)
    constraint.accept(4)
    assert allowed(constraint) == {4}
    with pytest.raises(DeadEnd) as refused:
        start(small, regex="ac").accept(4)
    assert str(refused.value) == (
        "regex: after 0 tokens of the answer, no token of the model's vocabulary may follow; change the constraint."
    )


def test_answers_of_one_grammar_are_independent(grammars: Grammars, tokenizer: Tokenizer) -> None:
    first, second = (start(grammars, json_schema=PERSON) for _ in range(2))
    before = allowed(second)
    first.accept(min(allowed(first)))
    assert allowed(first) != before
    assert allowed(second) == before
    answers: list[str] = []
    threads = [
        threading.Thread(
            target=lambda i=i: answers.append(random_answer(grammars, tokenizer, i, json_schema=PERSON))
        )
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == sorted(
        random_answer(grammars, tokenizer, i, json_schema=PERSON) for i in range(6)
    )


def test_the_stack_size_of_other_threads_is_unchanged(grammars: Grammars) -> None:
    before = threading.stack_size()
    start(grammars, regex="unchanged")
    assert threading.stack_size() == before


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"json_schema": {"properties": {"a/b": {"items": {"if": {}}}}}},
            (
                "json_schema at #/properties/a~1b/items: expected a schema that llguidance can enforce, found:"
                ' Unimplemented keys: ["if"]; change the schema.'
            ),
        ),
        (
            {"json_schema": {"properties": {"x": {"anyOf": [{"type": "null"}, {"pattern": "(?=a)"}]}}}},
            (
                "json_schema at #/properties/x/anyOf/1: expected a schema that llguidance can enforce, found: a regular"
                " expression with an error: look-around, including look-ahead and look-behind, is not supported; change"
                " the schema."
            ),
        ),
        (
            {"json_schema": {"$ref": "#"}},
            (
                "json_schema: expected a schema that llguidance can enforce, found: no text satisfies it; change the"
                " schema."
            ),
        ),
        (
            {"json_schema": {"$ref": "http://localhost/x.json"}},
            (
                "json_schema: expected a schema that llguidance can enforce, found: Resource 'http://localhost/x.json'"
                " is not present in a registry and retrieving it failed: Default retriever does not fetch resources;"
                " change the schema."
            ),
        ),
        (
            {"regex": "a("},
            (
                "regex: expected a regular expression in Rust's syntax within llguidance's limits, found: a regular"
                " expression with an error: unclosed group; change the expression."
            ),
        ),
        (
            {"grammar": 'start: "a"\n  | foo'},
            (
                'grammar: expected a Lark grammar within llguidance\'s limits, found: unknown name: "foo" (line 1,'
                " column 8); change the grammar."
            ),
        ),
    ],
)
def test_what_llguidance_refuses_is_refused_by_name(
    grammars: Grammars, given: dict[str, Any], text: str
) -> None:
    with pytest.raises(PrecastError) as refused:
        start(grammars, **given)
    assert str(refused.value) == text


INDENTS = ["", " ", "\n", "\n" + 32 * " ", "\n" + 8 * "\t"]


@pytest.mark.parametrize("space", [*INDENTS, "  ", "\n\n", "\t", "\r", "\n" + 33 * " ", "\n \t"])
def test_whitespace_is_that_of_indented_json(grammars: Grammars, space: str) -> None:
    tokens = vocabulary_bytes(grammars._tokenizer, padded(grammars._tokenizer))
    text = " " * drops_first_space(grammars._tokenizer, tokens) + f"[{space}]"
    ids = [tokens.index(char.encode()) for char in text]

    def allows(**options: bool) -> bool:
        answer = start(grammars, json_schema={"type": "array", "x-guidance": options})
        return all(token in allowed(answer) and not answer.accept(token) for token in ids)

    assert allows() == (space in INDENTS)
    assert (allows(whitespace_flexible=True), allows(whitespace_flexible=False)) == (True, space == "")


def test_a_model_without_an_end_token_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(PrecastError) as refused:
        start(Grammars(tokenizer, padded(tokenizer), []), regex="a")
    assert str(refused.value) == (
        "A constrained answer needs an end token, and this model has none; generate without a constraint."
    )


def test_a_missing_package_is_named_with_the_command(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(PrecastError) as refused:
        start(Grammars(tokenizer, padded(tokenizer), [END]), regex="a")
    assert str(refused.value) == (
        "constraints need llguidance, which is not installed: pip install 'precast[grammar]'"
    )


# --- the model and the command line -------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_model_answers_within_constraints(tiny_model: Any, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=100, choice=("yes", "no"))
    found = tiny_model.generate("the cat", params)
    assert (found.text in ("yes", "no"), found.finish_reason) == (True, "stop")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]} | {
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    many = tiny_model.generate_many(["the", "cat", "sat"], replace(params, choice=(), json_schema=schema))
    assert all(json.loads(answer.text)["a"] in (1, 2) for answer in many)
    cut = tiny_model.generate("the cat", replace(params, choice=(), regex="[a-z]{60}", max_tokens=3))
    assert (len(cut.token_ids), cut.finish_reason) == (3, "length")
    stopped = tiny_model.generate("the cat", replace(params, choice=("a;b",), stop=(";",)))
    assert (stopped.text, stopped.finish_reason) == ("a", "stop")


def test_answers_are_the_same_with_drafts_and_beside_others(slots_model: Any) -> None:
    shape = {"type": "array", "items": {"const": "the cat sat on the mat"}, "minItems": 2, "maxItems": 3}
    params = SamplingParams(json_schema=shape | {"x-guidance": {"whitespace_flexible": False}}, max_tokens=90)
    alone = slots_model.generate("the cat sat", replace(params, prompt_lookup=False))
    assert json.loads(alone.text) == ["the cat sat on the mat"] * len(json.loads(alone.text))
    drafted = slots_model.generate("the cat sat", params)
    others = [None, params, SamplingParams(regex="[a-z]{40}"), params]
    many = slots_model.generate_many(["the", "the cat sat", "on", "the cat sat"], others)
    assert {alone.token_ids} == {a.token_ids for a in (drafted, many[1], many[3])}


def test_an_unsuitable_constraint_is_refused_before_the_first_step(tiny_model: Any) -> None:
    with pytest.raises(PrecastError, match=r"^prompts\[1\]: regex: expected a regular expression"):
        tiny_model.generate_many(["the", "cat"], [None, SamplingParams(regex="(")])


def test_a_dead_end_finishes_with_the_text_so_far(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Constraint.mask

    def mask(constraint: Constraint) -> np.ndarray:
        if constraint._accepted == 2:
            raise DeadEnd("no token")
        return original(constraint)

    monkeypatch.setattr(Constraint, "mask", mask)
    found = tiny_model.generate("the cat", SamplingParams(regex="[a-z]{60}", max_tokens=30))
    assert (len(found.token_ids), found.finish_reason) == (2, "length")
    assert len(found.text) >= 2


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "schema.json").write_text(
        '{"const": [1, "é"], "x-guidance": {"whitespace_flexible": false}}', encoding="utf-8"
    )
    (tmp_path / "grammar.lark").write_text('start: "x" "y"')
    (tmp_path / "latin.json").write_bytes(b"\xe9")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--json-schema", "schema.json"), r"\[1,\"é\"\]"),
        (("--grammar", "grammar.lark"), "xy"),
        (("--regex", "[0-9]{4}"), r"\d{4}"),
        (("--choice", "yes", "--choice", "no"), "yes|no"),
    ],
)
def test_the_command_line_constrains_answers(
    cli: Callable[..., Any], tiny_artifact: Path, files: Path, options: tuple[str, ...], text: str
) -> None:
    given = [str(files / option) if "." in option else option for option in options]
    result = cli("run", tiny_artifact, "-p", "the cat", "-n", "110", *given)
    assert re.fullmatch(text, result.stdout.strip()), result.stdout


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--json-schema", "none.json"), "cannot read 'none.json': No such file or directory."),
        (("--grammar", "latin.json"), "expected a file of UTF-8 text, found other bytes in 'latin.json'."),
        (
            ("--json-object", "--json-schema", "schema.json"),
            "--json-object and --json-schema cannot be combined; give one of them.",
        ),
    ],
)
def test_the_command_line_refuses_unsuitable_options(
    cli: Callable[..., Any],
    tiny_artifact: Path,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    text: str,
) -> None:
    monkeypatch.chdir(files)
    result = cli("run", tiny_artifact, "-p", "the cat", *options)
    assert text in result.stderr
