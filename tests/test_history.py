"""Artifacts of earlier formats (`tests/golden/`): each gives its recorded answers, or its version is refused."""

import json
import re
from datetime import date
from pathlib import Path

import pytest

from precast import kernels
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest import FORMAT_VERSION
from precast.loaders.artifact.upgrade import UPGRADES
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.generation.stored_prefixes import obstacle
from precast.loaders.load import load
from precast.loaders.locate import read_manifest

HERE = Path(__file__).resolve().parent
FOLDERS = sorted(p for p in (HERE / "golden").iterdir() if (p / "manifest.json").is_file())
NAME = re.compile(r"(\d{4}-\d{2}-\d{2})-format-(\d+)")
# Limit in bytes for all files of an artifact in the repository.
LARGEST = 300_000


def version_of(folder: Path) -> int:
    named = NAME.fullmatch(folder.name)
    assert named is not None, (
        f"{folder.name}: expected the day and the format version, like 2026-11-22-format-4"
    )
    date.fromisoformat(named[1])
    return int(named[2])


def readable() -> list[Path]:
    return [folder for folder in FOLDERS if version_of(folder) in (*UPGRADES, FORMAT_VERSION)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_artifact_is_small_and_named_after_its_format(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format_version"] == version_of(folder)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= LARGEST


@pytest.mark.parametrize("target", [None, "portable"])
@pytest.mark.parametrize("folder", readable(), ids=lambda folder: folder.name)
def test_supported_formats_give_their_recorded_answers(folder, target, own_cache):
    """Test the executables if they match this machine and jaxlib, and the StableHLO, compiled here."""
    target = next(
        (t.name for t in read_manifest(folder).targets if target and t.runtime == "stablehlo"), None
    )
    model = load(folder, target=target, allow_compile=True, rehash=True, log=lambda _: None)
    answers = json.loads((folder / "golden.json").read_text())["greedy"]
    assert answers
    for answer in answers:
        expected = tuple(answer["token_ids"])
        if expected:  # the list is empty if the first token was a tie
            params = SamplingParams(ignore_eos=True, max_tokens=len(expected))
            assert model.generate(answer["prompt_token_ids"], params).token_ids == expected


# The first format with stored prefixes.
PREFIXES = 6


@pytest.mark.parametrize(
    "folder", [f for f in readable() if version_of(f) >= PREFIXES], ids=lambda folder: folder.name
)
def test_a_prompt_starts_after_the_stored_prefix_and_verify_replays_it(folder, cli, greedy, own_cache):
    """If the kernels use another instruction set here, the whole prompt is computed, and the answer is still right."""
    model = load(folder, allow_compile=True, prefix_memory=0, log=lambda _: None)
    (prefix,) = model.manifest.prefixes
    prompt = [*json.loads((folder / prefix.file).read_text()), 3, 4, 5]
    found = model.generate(prompt, SamplingParams(ignore_eos=True, max_tokens=8))
    assert found.token_ids == greedy(model.engine, prompt, 8)
    verified = cli("verify", folder, "--compile")
    assert verified.exit_code == 0, verified.output
    reason = obstacle(prefix, model.manifest, model.target, kernels.isa())
    verdict = "recomputed and compared" if reason is None else f"not compared: {reason}"
    assert f"  prefix    {prefix.name}: {prefix.tokens} tokens, {verdict}" in verified.stdout
    assert found.timing.cached_tokens == (prefix.tokens if reason is None else 0)


@pytest.mark.parametrize(
    "folder", [f for f in FOLDERS if f not in readable()], ids=lambda folder: folder.name
)
def test_unsupported_formats_are_refused_by_version(folder):
    with pytest.raises(PrecastError) as raised:
        load(folder, allow_compile=True)
    version = version_of(folder)
    advice = "update precast." if version > FORMAT_VERSION else "export the model again."
    assert str(raised.value) == (
        f"{folder / 'manifest.json'}: expected format version {min(UPGRADES)} to {FORMAT_VERSION}, found {version};"
        f" {advice}"
    )


def test_every_format_has_an_artifact_and_a_row_in_the_history():
    """A change of the format needs both; tests/golden/make.py makes the artifact."""
    versions = list(range(1, FORMAT_VERSION + 1))
    assert sorted(map(version_of, FOLDERS)) == versions
    page = (HERE.parent / "artifacts" / "README.md").read_text()
    rows = re.findall(
        r"^\| (\d+) \| ([^|]+) \| ([^|]+) \|$", page.partition("\n## History\n")[2], re.MULTILINE
    )
    assert sorted(int(version) for version, _, _ in rows) == versions
    assert f"specifies version {FORMAT_VERSION} of the format" in page
