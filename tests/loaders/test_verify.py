"""``precast verify``: files as listed, and answers as recorded."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest

from precast.loaders.artifact.golden import parse_golden
from precast.loaders.audit.verify import batch_problems, replay
from precast.loaders.generation.engine import Engine
from precast.loaders.locate import read_manifest
from precast.loaders.progress import Step


@pytest.fixture
def golden(tiny_artifact):
    manifest = read_manifest(tiny_artifact)
    return parse_golden((tiny_artifact / "golden.json").read_bytes(), manifest, "g")


def rewrite_golden(root, edit_manifest, change):
    """Edit the golden answers and their hash in the manifest."""
    from hashlib import sha256

    value = json.loads((root / "golden.json").read_text())
    change(value["greedy"])
    data = json.dumps(value).encode()
    (root / "golden.json").write_bytes(data)
    entry = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    edit_manifest(root, lambda manifest: manifest["files"].update({"golden.json": entry}))


# --- the command --------------------------------------------------------------------------------------------


def test_an_unchanged_artifact(cli, tiny_artifact, tiny_model):
    result = cli("verify", tiny_artifact)
    assert (result.exit_code, result.stderr) == (0, "")
    first, files, answers, logits = result.stdout.splitlines()
    assert first == f"tiny is as exported: the same files, the same answers  ({tiny_artifact})"
    manifest = read_manifest(tiny_artifact)
    assert files.startswith(f"  files     {len(manifest.files)} of {len(manifest.files)} as listed, ")
    assert answers.endswith(f"tokens, by target {tiny_model.target.name}")
    assert "48 compared, largest difference" in logits
    found = json.loads(cli("verify", tiny_artifact, "--json").stdout)
    assert (found["ok"], found["problems"]) == (True, [])
    assert found["files"]["bytes"] == sum(entry.bytes for entry in manifest.files.values())
    assert found["replay"]["target"] == tiny_model.target.name
    assert 0 <= found["replay"]["share"] < 0.5


def test_another_target_answers_on_request(cli, tiny_artifact):
    result = cli("verify", tiny_artifact, "--target", "portable", "--compile", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["ok"], found["replay"]["target"]) == (True, "portable")
    assert found["replay"]["tokens"] > 50


def test_every_file_that_differs_is_named_and_nothing_is_run(cli, artifact_copy):
    for name in ("README.md", "programs/cpu/decode.stablehlo"):
        with (artifact_copy / name).open("ab") as file:
            file.write(b"x")
    (artifact_copy / "tokenizer.json").unlink()
    (artifact_copy / "note.txt").write_text("mine")
    result = cli("verify", artifact_copy)
    assert result.exit_code == 1
    shown = result.stdout.splitlines()
    assert shown[0] == f"tiny differs from what was exported  ({artifact_copy})"
    assert "  answers   not replayed, because files differ" in shown
    for name in ("'README.md'", "'programs/cpu/decode.stablehlo'", "'tokenizer.json'", "'note.txt'"):
        assert any(line.startswith(f"  ! {artifact_copy}: ") and name in line for line in shown)
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith(f"error: {artifact_copy}: file 'README.md' has ")
    assert sentence.endswith("(3 more differ)")
    assert json.loads(cli("verify", artifact_copy, "--json").stdout)["replay"] is None


def test_tokens_that_differ(cli, artifact_copy, edit_manifest):
    def change(greedy):
        greedy[1]["token_ids"][3] = 7

    rewrite_golden(artifact_copy, edit_manifest, change)
    result = cli("verify", artifact_copy)
    assert result.exit_code == 1
    (sentence,) = result.stderr.splitlines()
    assert f"error: {artifact_copy}: answer 1: token 3 is " in sentence
    assert (
        ", but 7 was recorded (prompt of 10 tokens); this artifact computes other numbers on this machine"
        in sentence
    )


def test_logits_that_differ(cli, artifact_copy, edit_manifest):
    def change(greedy):
        greedy[2]["first_logits"]["values"][5] += 0.01

    rewrite_golden(artifact_copy, edit_manifest, change)
    result = cli("verify", artifact_copy, "--json")
    assert result.exit_code == 1
    (sentence,) = result.stderr.splitlines()
    assert (
        "answer 2: a logit of its first step differs from the recorded one by 0.01, but the tolerance is 0.0015"
        in sentence
    )
    found = json.loads(result.stdout)
    assert found["problems"] == [sentence.removeprefix("error: ")]
    assert found["replay"]["share"] > 5


def test_the_answers_are_also_given_in_batches_and_scored(tiny_model, golden, monkeypatch):
    rows, scored = [], []
    decode, score = Engine.decode, Engine.score

    def recorded_decode(self, given, cache):
        rows.append(tuple(row.slot for row in given))
        return decode(self, given, cache)

    def recorded_score(self, tokens, cache, **place):
        scored.append(len(tokens))
        return score(self, tokens, cache, **place)

    monkeypatch.setattr(Engine, "decode", recorded_decode)
    monkeypatch.setattr(Engine, "score", recorded_score)
    assert batch_problems(tiny_model, golden, "w") == []
    lengths = [len(answer.token_ids) for answer in golden.greedy if answer.token_ids]
    slots = range(8)[::-1][: len(lengths)]
    expected = [
        tuple(slot for slot, length in zip(slots, lengths, strict=True) if length > step)
        for step in range(1, max(lengths))
    ]
    assert (rows, scored) == (expected, lengths)
    assert len(lengths) > 2


@pytest.mark.parametrize(("function", "how"), [("_decoded", "in a batch"), ("_scored", "scored")])
def test_a_batch_or_a_score_that_differs(cli, tiny_artifact, monkeypatch, function, how):
    from precast.loaders.audit import verify

    original = getattr(verify, function)

    def wrong(engine, answers):
        found = original(engine, answers)
        (found[1] if function == "_decoded" else found)[2] = 7
        return found

    monkeypatch.setattr(verify, function, wrong)
    result = cli("verify", tiny_artifact, "--json")
    assert result.exit_code == 1
    first, *_ = json.loads(result.stdout)["problems"]
    assert re.fullmatch(
        rf"{tiny_artifact}: answer \d, {how}: token 2 is 7, but \d+ was recorded \(prompt of \d+ tokens\);"
        r" this artifact computes other numbers on this machine than at export: do not use it here, and report this\.",
        first,
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_difference_that_is_not_finite_is_valid_json(cli, tiny_artifact, monkeypatch, value):
    from precast.loaders.audit import verify

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    monkeypatch.setattr(verify, "_token_problems", lambda *_: [])
    monkeypatch.setattr(verify, "_difference", lambda model, answer: value)
    result = cli("verify", tiny_artifact, "--json")
    assert result.exit_code == 1
    played = json.loads(result.stdout, parse_constant=no_constant)["replay"]
    assert (played["difference"], played["share"]) == (None, None)
    shown = cli("verify", tiny_artifact).stdout.splitlines()
    assert "  logits    48 compared, largest difference not finite, beyond the tolerance" in shown


def test_an_undecodable_name_is_valid_json(python, artifact_copy):
    (artifact_copy / "README.md").unlink()  # so that no program runs
    (artifact_copy / os.fsdecode(b"na\xefve")).touch()
    result = python("-m", "precast.cli", "verify", artifact_copy, "--json", env={"PYTHONIOENCODING": "ascii"})
    assert (result.returncode, "Traceback" in result.stderr) == (1, False)
    assert json.loads(result.stdout)["files"]["unlisted"] == ["na\udcefve"]


def test_nothing_is_run_where_tensorflow_would_read_an_unlisted_file(cli, artifact_copy, edit_manifest):
    """The runtime raises an error for such a folder; the command reports it as a difference."""
    folder = artifact_copy / "programs/model"
    folder.mkdir()
    (folder / "saved_model.pb").touch()

    def change(manifest):
        empty = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
        manifest["files"]["programs/model/saved_model.pb"] = empty
        manifest["targets"][1]["runtime"] = "savedmodel"
        for program in manifest["targets"][1]["programs"]:
            program["executable"] = "programs/model/saved_model.pb"

    edit_manifest(artifact_copy, change)
    (artifact_copy / "note.txt").touch()
    (artifact_copy / "programs/models").touch()
    assert json.loads(cli("verify", artifact_copy, "--json").stdout)["replay"] is not None
    (folder / "assets").mkdir()
    (folder / "assets/x").touch()
    result = cli("verify", artifact_copy, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["replay"], found["files"]["problems"]) == (None, [])
    assert any("'programs/model/assets/x' is not listed" in problem for problem in found["problems"])


def test_golden_answers_are_read_strictly(cli, artifact_copy, edit_manifest):
    rewrite_golden(artifact_copy, edit_manifest, lambda greedy: greedy[0].update(temperature=1))
    result = cli("verify", artifact_copy)
    assert result.exit_code == 2
    assert "golden.json: greedy[0]: key 'temperature' is not known to this format version" in result.stderr


def test_what_cannot_run_here_is_exit_code_2(cli, artifact_copy, edit_manifest):
    edit_manifest(artifact_copy, lambda m: m["targets"][0].update(jaxlib="0.9.9"))
    result = cli("verify", artifact_copy)
    assert result.exit_code == 2
    assert "it was compiled by jaxlib 0.9.9, but" in result.stderr


# --- replaying ----------------------------------------------------------------------------------------------


def test_progress_is_reported(tiny_artifact, tiny_model, golden):
    from precast.loaders.audit.verify import check_files

    seen = []
    manifest = read_manifest(tiny_artifact)
    check_files(tiny_artifact, manifest, seen.append)
    total = sum(entry.bytes for entry in manifest.files.values())
    assert seen[-1] == Step(text="hashing", done=total, total=total, unit="bytes")
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    seen.clear()
    replay(tiny_model, golden, "x", seen.append)
    count = len(golden.greedy)
    assert seen == [Step(text="answering", done=i, total=count, unit="prompts") for i in range(count)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_outside_any_tolerance(tiny_model, golden, monkeypatch, value):
    original = tiny_model.engine.logits
    monkeypatch.setattr(tiny_model.engine, "logits", lambda step: np.full_like(original(step), value))
    found = replay(tiny_model, golden, "x")
    assert len(found.problems) == len(golden.greedy)
    assert "a logit of its first step differs from the recorded one by" in found.problems[0]
    assert (found.difference, found.share) == (None, None)


def with_tolerances(golden, *tolerances):
    """Return the first answers, without tokens and each with a different tolerance."""
    greedy = []
    for answer, tolerance in zip(golden.greedy, tolerances, strict=False):
        first = dataclasses.replace(answer.first_logits, tolerance=tolerance)
        greedy.append(dataclasses.replace(answer, token_ids=(), first_logits=first))
    return dataclasses.replace(golden, greedy=tuple(greedy))


def test_each_difference_is_measured_by_its_own_tolerance(tiny_model, golden, monkeypatch):
    from precast.loaders.audit import verify

    found = iter((0.5, 0.1))
    monkeypatch.setattr(verify, "_difference", lambda model, answer: next(found))
    played = replay(tiny_model, with_tolerances(golden, 1.0, 0.4), "x")
    assert (played.difference, played.share, played.problems) == (0.5, 0.5, ())


@pytest.mark.parametrize(
    ("found", "share"), [(0.0, 0.0), (1e-9, None), (float("nan"), None), (float("inf"), None)]
)
def test_a_tolerance_of_zero(tiny_model, golden, monkeypatch, found, share):
    from precast.loaders.audit import verify

    monkeypatch.setattr(verify, "_difference", lambda model, answer: found)
    played = replay(tiny_model, with_tolerances(golden, 0.0), "x")
    assert played.share == share
    assert bool(played.problems) == (share is None)


def test_slots_answer_alike(slots_artifact, slots_model):
    manifest = read_manifest(slots_artifact)
    golden = parse_golden((slots_artifact / "golden.json").read_bytes(), manifest, "g")
    assert replay(slots_model, golden, "x").problems == ()
