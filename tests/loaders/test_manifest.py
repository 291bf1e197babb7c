"""Manifests: strict parsing, and rejection of inconsistent ones."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.json_records import to_json
from precast.loaders.artifact.manifest import FORMAT_VERSION
from precast.loaders.artifact.manifest_parser import parse_manifest


@pytest.fixture(scope="module")
def good(tiny_artifact):
    return json.loads((tiny_artifact / "manifest.json").read_text())


def error(value) -> str:
    with pytest.raises(PrecastError) as raised:
        parse_manifest(json.dumps(value).encode(), "m.json")
    return str(raised.value)


def changed(good, path, value):
    """Return a copy in which the value at a path of keys and indices is replaced, or removed if `value` is `...`."""
    result = copy.deepcopy(good)
    *way, last = path
    place = result
    for step in way:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return result


def test_round_trip(tiny_artifact):
    data = (tiny_artifact / "manifest.json").read_bytes()
    manifest = parse_manifest(data, "m.json")
    assert to_json(manifest).encode() == data
    assert (manifest.context, manifest.slots, manifest.buckets) == (64, 8, (8, 16))
    names = ["cache", "prefill_8", "prefill_16", "decode", "score"]
    assert [p.name for p in manifest.targets[0].programs] == names
    assert [p.name for p in manifest.targets[1].programs] == [*names[:3], "decode_1", *names[3:]]
    assert [t.runtime for t in manifest.targets] == ["pjrt", "stablehlo"]


@pytest.mark.parametrize(
    ("version", "advice"),
    [(FORMAT_VERSION + 1, "update precast."), (10**30, "update precast."), (0, "again.")],
)
def test_another_format_version_is_named_before_anything_else(good, version, advice):
    text = error(changed(good, ["format_version"], version) | {"unknown": 1})
    assert text.startswith(f"m.json: expected format version 4 to {FORMAT_VERSION}, found {version};")
    assert text.endswith(advice)


@pytest.mark.parametrize("value", [None, "1", True, 1.0, []])
def test_a_format_version_must_be_an_integer(good, value):
    assert error(changed(good, ["format_version"], value)).startswith(
        "m.json: expected a precast manifest with a"
    )


@pytest.mark.parametrize("value", [[], 1, "x", {}, None])
def test_other_json_is_not_a_manifest(value):
    assert (
        error(value)
        == "m.json: expected a precast manifest with a format_version, found none; check the path, or export the"
        " model again."
    )


def in_format_4(good):
    """Return the manifest as a precast with format 4 would have written it."""
    sampling = {"temperature": 1.0, "top_k": 20.0}
    tokenizer = {key: value for key, value in good["tokenizer"].items() if key != "named_templates"}
    return {**in_format_5(good), "format_version": 4, "tokenizer": tokenizer, "sampling": sampling}


def in_format_5(good):
    """Return the manifest as a precast with format 5 would have written it, with the programs of format 6."""
    return {key: value for key, value in good.items() if key != "prefixes"} | {"format_version": 5}


def test_format_5_is_read_as_format_6(good):
    found = parse_manifest(json.dumps(in_format_5(good)).encode(), "m.json")
    assert json.loads(to_json(found)) == good


def test_format_5_has_no_prefixes(good):
    assert error(in_format_5(good) | {"prefixes": []}) == (
        "m.json: key 'prefixes' is not known to this format version; update precast, or export the model again."
    )


def without(good, programs, inputs):
    """Return the manifest without the programs of some kinds, and without some inputs of decode."""
    result = copy.deepcopy(good)
    for target in result["targets"]:
        target["programs"] = [p for p in target["programs"] if p["name"] not in programs]
        for program in target["programs"]:
            if program["kind"] == "decode":
                program["arguments"] = [a for a in program["arguments"] if a["name"] not in inputs]
    return result


def test_targets_of_earlier_formats_have_no_score_and_no_slots(good):
    found = parse_manifest(json.dumps(without(good, {"score", "decode_1"}, {"slots"})).encode(), "m.json")
    assert not any(p.has_slots for target in found.targets for p in target.of_kind("decode"))
    text = error(without(good, {"score"}, {"slots"}))  # decode_1 has no input that states the slot of its row
    assert text == (
        "m.json: target 'portable': decode programs: expected different numbers of rows, with 8 as the largest, found"
        " [1, 8]; export the model again."
    )


def test_format_4_is_read_as_the_current_one(good):
    found = parse_manifest(json.dumps(in_format_4(good)).encode(), "m.json")
    assert json.loads(to_json(found)) == {**good, "sampling": found.sampling.__dict__ | FOUR_LISTS}
    assert found.sampling.given() == {"temperature": 1.0, "top_k": 20}
    assert isinstance(found.sampling.top_k, int)


FOUR_LISTS = {key: [] for key in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "stop")}


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (
            ["tokenizer", "named_templates"],
            {},
            "m.json: tokenizer: key 'named_templates' is not known to this",
        ),
        (
            ["sampling", "stop"],
            [],
            "m.json: sampling: key 'stop' is not known to this format version; update",
        ),
        (
            ["sampling", "top_q"],
            1.0,
            "m.json: sampling: key 'top_q' is not known to this format version; update",
        ),
        (["sampling", "top_k"], 20.5, "m.json: sampling.top_k: expected a whole number, found 20.5"),
        (["sampling", "top_k"], 1e300, "m.json: sampling.top_k: expected a whole number from 0 to 2^63 - 1"),
        (["sampling"], [], "m.json: sampling: expected an object, found a list"),
        (["sampling"], ..., "m.json: key 'sampling' is missing; export the model again."),
        (["tokenizer"], ..., "m.json: key 'tokenizer' is missing; export the model again."),
    ],
)
def test_format_4_is_checked_as_strictly(good, path, value, text):
    assert error(changed(in_format_4(good), path, value)).startswith(text)


PROGRAM = ["targets", 0, "programs"]  # 0 cache, 1 prefill_8, 2 prefill_16, 3 decode, 4 score


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        (["rope"], 1, "m.json: key 'rope' is not known to this format version"),
        (["model", "rope"], 1, "m.json: model: key 'rope' is not known"),
        (["targets", 1, "x"], 1, "m.json: targets[1]: key 'x' is not known"),
        ([*PROGRAM, 2, "name"], 1, "m.json: targets[0].programs[2].name: expected a string, found 1"),
        (
            [*PROGRAM, 2, "arguments", 0, "shape", 0],
            -1,
            "targets[0].programs[2].arguments[0].shape[0]: expected",
        ),
        (
            ["files", "golden.json", "bytes"],
            "1",
            "m.json: files['golden.json'].bytes: expected a whole number",
        ),
        (
            ["files", "golden.json"],
            ...,
            "m.json: file 'golden.json' is used but not listed under files; export the model again.",
        ),
        (["files", "weights.safetensors"], ..., "m.json: file 'weights.safetensors' is used but not listed"),
        (["files", "programs/cpu/decode.xla"], ..., "file 'programs/cpu/decode.xla' is used but not listed"),
        (
            ["tokenizer", "named_templates"],
            {"rag": "chat_templates/rag.jinja"},
            "m.json: file 'chat_templates/rag.jinja' is used but not listed under files; export the model again.",
        ),
        (["tokenizer", "file"], "../tokenizer.json", "file '../tokenizer.json' is used but not listed"),
        (
            ["sampling", "temperature"],
            "hot",
            "m.json: sampling.temperature: expected a number, found 'hot'",
        ),
        (
            ["model", "parameters"],
            0,
            "m.json: expected at least one parameter, found 0; export the model again.",
        ),
        (["slots"], 0, "m.json: expected at least one slot, one token in the vocabulary and one bucket"),
        (["buckets"], [], "m.json: expected at least one slot, one token in the vocabulary and one bucket"),
        (
            ["buckets"],
            [0, 16],
            "m.json: buckets: expected lengths from 1 to the context of 64, found [0, 16]",
        ),
        (
            ["buckets"],
            [8, 65],
            "m.json: buckets: expected lengths from 1 to the context of 64, found [8, 65]",
        ),
        (["buckets"], [16, 8], "m.json: buckets in ascending order: expected (8, 16), found (16, 8)"),
        (["buckets"], [8, 32], "kinds and lengths of its programs: expected"),
        (
            ["capacity"],
            1000,
            "m.json: cache 'cache.keys': expected 1000 to 1000 positions, found 64; export",
        ),
        (["capacity"], 50, "m.json: cache 'cache.keys': expected 50 to 50 positions, found 64; export"),
        (["slots"], 2, "m.json: cache 'cache.keys': slots and layers: expected {'B': 2, 'L': 3}"),
        (
            ["cache", 0, "layers"],
            [0, 1],
            "m.json: cache 'cache.keys': slots and layers: expected {'B': 8, 'L': 2}",
        ),
        (
            ["cache", 0, "axes"],
            "LBKS",
            "m.json: cache 'cache.keys': number of letters in its axes: expected 5, found 4",
        ),
        (["cache", 0, "layout"], [0, 1, 2, 3, 3], "m.json: cache 'cache.keys': axes in its layout"),
        (["cache", 0, "bytes"], 1, "m.json: cache 'cache.keys': bytes: expected 147456, found 1"),
        (["cache", 0, "dtype"], "float8", "m.json: cache 'cache.keys': bytes"),
        (["cache", 1], ..., "its KV cache differs from the artifact's"),
        (
            ["targets", 0, "runtime"],
            "pickle",
            "runtime: expected one of pjrt, stablehlo, savedmodel, found 'pickle'; update precast, or",
        ),
        (["targets", 1, "name"], "TWIN", "targets of this name: expected 1, found 2"),
        ([*PROGRAM, 2], ..., "kinds and lengths of its programs: expected [('cache', 0), ('prefill', 8)"),
        (
            [*PROGRAM, 3],
            ...,
            "decode programs: expected different numbers of rows, with 8 as the largest, found []",
        ),
        (
            [*PROGRAM, 3, "tokens"],
            2,
            "decode programs: expected different numbers of rows, with 8 as the largest",
        ),
        (
            ["targets", 1, "programs", 4],
            ...,
            "rows, with 8 as the largest, found [1]; export the model again.",
        ),
        (
            [*PROGRAM, 4, "tokens"],
            17,
            "score programs: expected at most one (with 1 to 16 tokens), found [17];",
        ),
        (
            [*PROGRAM, 4, "tokens"],
            15,
            "program 'score': inputs: expected {'tokens': ('tokens', (15,), 'int32')",
        ),
        ([*PROGRAM, 1, "kind"], "score", "kinds and lengths of its programs: expected"),
        ([*PROGRAM, 3, "kind"], "train", "kinds and lengths of its programs"),
        ([*PROGRAM, 1, "tokens"], 9, "kinds and lengths of its programs"),
        ([*PROGRAM, 2, "name"], "prefill_8", "distinct names of its programs: expected 5, found 4"),
        ([*PROGRAM, 3, "arguments", 0, "dtype"], "float32", "program 'decode': inputs: expected {'tokens'"),
        ([*PROGRAM, 3, "arguments", 0, "dtype"], "int8", "program 'decode': inputs: expected {'tokens'"),
        ([*PROGRAM, 3, "results", 0, "dtype"], "uint8", "program 'decode': results: expected {'token'"),
        (
            [*PROGRAM, 3, "arguments", 5, "dtype"],
            "int4",
            "dtype of 'rope.cos': expected one of float32, int32, bfloat16, float16, int8, uint8, found 'int4'",
        ),
        (["slots"], 1 << 40, "slots of 64 positions exceed any machine's memory"),
        (["capacity"], 1 << 40, "exceed any machine's memory"),
        ([*PROGRAM, 3, "arguments", 0, "name"], "positions", "program 'decode': inputs: expected"),
        ([*PROGRAM, 3, "arguments", 0, "role"], "weight", "arguments in the order inputs, caches, constants"),
        (
            [*PROGRAM, 3, "arguments", 6, "name"],
            "rope.cos",
            "two arguments or two results have the same name; export the model again.",
        ),
        (
            [*PROGRAM, 3, "arguments", 3, "shape", 3],
            65,
            "program 'decode': its KV cache differs from the artifact's",
        ),
        (
            [*PROGRAM, 3, "results", 2, "shape", 0],
            9,
            "program 'decode': its KV cache differs from the artifact's",
        ),
        (
            [*PROGRAM, 3, "results", 2, "alias"],
            "nobody",
            "aliases 'nobody', which is not an argument; export the model again.",
        ),
        (
            [*PROGRAM, 3, "results", 0],
            ...,
            "decode programs: expected different numbers of rows, with 8 as the largest, found [0]; export",
        ),
        ([*PROGRAM, 3, "results", 1, "shape"], [1, 9], "program 'decode': results: expected"),
        ([*PROGRAM, 0, "results", 0], ..., "program 'cache': its KV cache differs from the artifact's"),
    ],
)
def test_every_inconsistency_is_named(good, path, value, text):
    value = good["targets"][0]["name"] if value == "TWIN" else value
    assert text in error(changed(good, path, value))


def with_prefix(good, **changes):
    """Return the manifest with a stored prefix, some of whose values are changed."""
    prefix = {
        "name": "system",
        "tokens": 63,
        "file": "tokenizer.json",
        "arrays": "golden.json",
        "target": good["targets"][0]["name"],
        "kernels": 3,
        "isa": "avx2",
        "programs": "0" * 64,
        "weights": good["files"]["weights.safetensors"]["sha256"],
    }
    return good | {"prefixes": [prefix | changes]}


def test_prefixes_are_read(good):
    value = with_prefix(good)
    assert json.loads(to_json(parse_manifest(json.dumps(value).encode(), "m.json"))) == value


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"file": "x"}, "m.json: file 'x' is used but not listed under files; export the model again."),
        (
            {"arrays": "../x"},
            "m.json: file '../x' is used but not listed under files; export the model again.",
        ),
        ({"tokens": 0}, "m.json: prefix 'system': expected 1 to 63 tokens, found 0; export the model again."),
        (
            {"tokens": 64},
            "m.json: prefix 'system': expected 1 to 63 tokens, found 64; export the model again.",
        ),
        (
            {"target": "gone"},
            "m.json: prefix 'system': targets of this name: expected 1, found 0; export the model again.",
        ),
        (
            {"programs": "ab"},
            "m.json: prefix 'system': programs: expected a sha256 in hex, found 'ab'; export the model again.",
        ),
        (
            {"weights": "A" * 64},
            f"m.json: prefix 'system': weights: expected a sha256 in hex, found '{'A' * 64}'; export the model again.",
        ),
        (
            {"weights": "0" * 64},
            "m.json: prefix 'system': its keys and values were computed with other weights; export the model again.",
        ),
        ({"more": 1}, "m.json: prefixes[0]: key 'more' is not known to this format version; update precast"),
        ({"isa": 2}, "m.json: prefixes[0].isa: expected a string, found 2; export the model again."),
    ],
)
def test_invalid_prefixes_are_named(good, changes, text):
    assert error(with_prefix(good, **changes)).startswith(text)


@pytest.mark.parametrize("name", ["", ".x", "a/b", "..", "a b", "x" * 65, "é", "a\nb"])
def test_a_prefix_s_name_can_be_part_of_a_file_s(good, name):
    assert error(with_prefix(good, name=name)) == (
        f"m.json: prefix {name!r}: expected a name of 1 to 64 letters, digits, '-', '_' or '.', not"
        f" beginning with '.', found {name!r}; export the model again."
    )


def test_names_of_prefixes_are_unique(good):
    twice = with_prefix(good)["prefixes"] * 2
    assert error(good | {"prefixes": twice}) == (
        "m.json: prefixes: distinct names: expected 2, found 1; export the model again."
    )


def test_every_key_of_every_record_is_required(good):
    """Remove each key of each record in turn; the error must name it."""

    def records(value, path):
        names = ("files", "versions", "named_templates", "source_files")
        free = bool(path) and path[-1] in names  # the keys of this object are arbitrary names
        if isinstance(value, dict) and not free:
            yield from ((*path, key) for key in value)
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, inner in items:
            if not isinstance(key, int) or key == 0:  # check only the first item of each list
                yield from records(inner, [*path, key])

    good = with_prefix(good)
    paths = list(records(good, []))
    assert len(paths) > 60
    for path in paths:
        text = error(changed(good, path, ...))
        assert (
            "format_version" in text
            if path == ("format_version",)
            else f"key {path[-1]!r} is missing" in text
        )


def leaves(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from leaves(inner, (*path, key))


JUNK = st.sampled_from(
    [..., None, 0, 1, 2**40, 2**70, -1, 0.5, True, "", "x", "weight", "a/../b", [], {}, [1], [[]]]
)


@given(data=st.data())
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_is_accepted_or_raises_precast_error(good, data):
    value = good
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(sorted(leaves(value), key=str)))
        value = changed(value, path, data.draw(JUNK))
    text = "m.json: fine"
    try:
        parse_manifest(json.dumps(value).encode(), "m.json")
    except PrecastError as problem:
        text = str(problem)
    assert text.startswith("m.json: ")
    assert "\n" not in text
