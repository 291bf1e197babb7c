"""``precast check``: all obstacles at once, each with its remedy, from the manifest alone."""

import dataclasses
import json
import shlex
from datetime import date
from pathlib import Path

import pytest

from precast.loaders.audit.check import check
from precast.loaders.compiling import isa
from precast.loaders.console.check import lines
from precast.loaders.locate import read_manifest
from precast.loaders.runtime.installed import this_machine
from precast.loaders.runtime.resources import Limits, Memory, Processors

GB = 1 << 30
ROOT = Path("/art")
NO_LIMITS = Limits(address_space=None, threads=None)
TODAY = date(2026, 1, 1)


@pytest.fixture(scope="module")
def good(tiny_artifact):
    """Return the tiny artifact's manifest, whose StableHLO is promised to compile for 100 more days."""
    manifest = read_manifest(tiny_artifact)
    targets = tuple(dataclasses.replace(t, stablehlo_expires="2026-04-11") for t in manifest.targets)
    return dataclasses.replace(manifest, targets=targets)


def with_target(manifest, **changes):
    first, *others = manifest.targets
    return dataclasses.replace(manifest, targets=(dataclasses.replace(first, **changes), *others))


def examine(
    manifest, *, machine=None, processors=None, memory=None, limits=NO_LIMITS, today=TODAY, **options
):
    return check(
        ROOT,
        manifest,
        machine or this_machine(),
        processors or Processors(cores=8, usable=8, quota=None),
        memory or Memory(limit=8 * GB, available=4 * GB),
        limits,
        today,
        **options,
    )


def text(report) -> str:
    return "\n".join(lines(report))


def test_an_artifact_that_fits(good):
    report = examine(good)
    assert report.runs
    assert report.target == good.targets[0].name
    assert (report.problems, report.notes) == ((), ())
    assert report.targets[0].mismatches == ()
    first, *rest = text(report).splitlines()
    assert first == f"tiny runs here, as target {good.targets[0].name}  (/art)"
    assert "  StableHLO promised to compile until 2026-04-11, 100 days" in rest
    assert "  signature none" in rest
    assert len(rest) <= 8


def test_every_mismatch_at_once_each_with_its_remedy(good):
    machine = this_machine()
    bad = with_target(
        good,
        jaxlib="0.9.9",
        cpu_features=(*good.targets[0].cpu_features, "warp"),
        kernel_abi=99,
        kernels=("precast.new.v7",),
        machine="riscv64",
    )
    report = examine(bad)
    assert not report.runs
    assert report.target is None
    found = {(m.what, m.problem): m.remedy for m in report.targets[0].mismatches}
    abi = f"it calls kernels of ABI 99, but ABI {machine.kernel_abi} is installed"
    assert set(found) == {
        ("machine", f"it was compiled for riscv64, but this machine is {machine.machine}"),
        ("jaxlib", f"it was compiled by jaxlib 0.9.9, but {machine.jaxlib} is installed"),
        ("CPU features", "it uses CPU features that this machine lacks (warp)"),
        ("kernels", abi),
        ("kernels", "it calls kernels that are not installed (precast.new.v7)"),
    }
    maker = good.provenance.versions["precast"]
    assert (
        found["kernels", abi]
        == f"pip install precast=={maker}, which made the artifact, or export the model again"
    )
    shown = text(report)
    assert shown.startswith("tiny does not run here  (/art)\n")
    for (_, problem), remedy in found.items():
        assert f"    ! {problem}\n        → {remedy}\n" in shown


HOSTILE = "1; touch $(x) `y` 'z'"


def test_text_of_a_manifest_is_one_word_of_a_command(good):
    """Users copy remedies into shells, so the text must be quoted."""
    provenance = dataclasses.replace(
        good.provenance, versions={**good.provenance.versions, "precast": HOSTILE}
    )
    bad = dataclasses.replace(good, provenance=provenance)
    bad = with_target(bad, jaxlib=HOSTILE, kernel_abi=99)
    jaxlib, kernels = examine(bad).targets[0].mismatches
    assert shlex.split(jaxlib.remedy.partition(", or precast")[0]) == [
        "pip", "install", f"jaxlib=={HOSTILE}"
    ]  # fmt: skip
    assert shlex.split(kernels.remedy.partition(", which made the artifact")[0]) == [
        "pip", "install", f"precast=={HOSTILE}"
    ]  # fmt: skip
    only = dataclasses.replace(good, targets=(dataclasses.replace(good.targets[1], name=HOSTILE),))
    (compiling,) = examine(only).targets[0].mismatches
    assert shlex.split(compiling.remedy) == [
        "precast", "run", "/art", "--target", HOSTILE, "--compile"
    ]  # fmt: skip


def test_the_artifact_s_path_is_one_word_of_a_command(good):
    root = Path("/my models/a;b")
    machine, memory = this_machine(), Memory(limit=8 * GB, available=4 * GB)
    processors = Processors(cores=8, usable=8, quota=None)
    manifest = with_target(good, jaxlib="0.9.9")
    report = check(root, manifest, machine, processors, memory, NO_LIMITS, date(2026, 4, 12))
    remedies = [m.remedy for t in report.targets for m in t.mismatches] + [n.remedy for n in report.notes]
    for remedy in remedies:
        assert "/my models/a;b" not in remedy.replace("'/my models/a;b'", "")
    assert sum("'/my models/a;b'" in remedy for remedy in remedies) == 3


def test_a_manifest_cannot_forge_a_remedy(good):
    machine = dataclasses.replace(this_machine(), gpus=("NVIDIA H100",), cuda_plugin=this_machine().jaxlib)
    bad = with_target(good, platform="cuda", device="A: pip install evil", machine="any", kernels=())
    for finding in examine(bad, machine=machine).targets[0].mismatches:
        assert not finding.remedy.startswith("pip install evil")


def test_the_instruction_set_to_export_for_is_the_widest_that_is_there(good):
    bad = with_target(good, cpu_features=("warp",), machine="any")
    for level, facts in isa.LEVELS.items():
        machine = dataclasses.replace(this_machine(), machine="x86_64", features=(*facts.features, "aes"))
        (finding,) = examine(bad, machine=machine).targets[0].mismatches
        assert finding.remedy.startswith(f"export with --cpu-isa {level} or ")
    # Without one feature of the narrowest level, or in another family, a machine has no level.
    few = isa.LEVELS["x86-64-v2"].features[1:]
    for changes in ({"machine": "x86_64", "features": few}, {"machine": "aarch64", "features": ("neon",)}):
        machine = dataclasses.replace(this_machine(), **changes)
        (finding,) = examine(bad, machine=machine).targets[0].mismatches
        assert finding.remedy.startswith("export on a machine like this one or ")


def test_compiling_here_is_a_remedy_where_it_helps(good):
    report = examine(with_target(good, jaxlib="0.9.9"))
    (jaxlib,) = report.targets[0].mismatches
    assert report.targets[0].compiles
    assert jaxlib.remedy == (
        "pip install jaxlib==0.9.9, or precast add-target /art, or precast run /art --compile"
    )
    compiled = examine(with_target(good, jaxlib="0.9.9"), allow_compile=True)
    assert (compiled.runs, compiled.compiled) == (True, True)
    assert f"runs here, as target {compiled.target}, compiled first" in text(compiled)


def test_a_target_that_is_always_compiled(good):
    report = examine(good, target="portable")
    assert not report.runs
    assert text(report).splitlines()[1:3] == [
        "  target    portable: fits once it is compiled here",
        "        → precast run /art --target portable --compile",
    ]
    assert examine(good, target="portable", allow_compile=True).runs


def test_another_platform_and_a_package_that_is_missing(good):
    report = examine(with_target(good, platform="cuda", device="NVIDIA H100"))
    found = report.targets[0].mismatches
    assert found
    assert {m.what for m in found} == {"platform"}
    assert "a machine with cuda (NVIDIA H100)" in {m.remedy for m in found}
    machine = dataclasses.replace(this_machine(), tensorflow=False)
    report = examine(with_target(good, runtime="savedmodel", platform="any"), machine=machine)
    (tensorflow,) = report.targets[0].mismatches
    assert (tensorflow.what, tensorflow.remedy) == ("TensorFlow", "pip install 'precast[savedmodel]'")


def test_memory(good):
    need = examine(good).need
    assert need.all == need.weights + need.cache + need.temporary
    assert min(need.weights, need.cache, need.temporary) > 0
    never = examine(good, memory=Memory(limit=need.all - 1, available=1))
    assert not never.runs
    assert [p.what for p in never.problems] == ["memory"]
    assert "of memory, but this machine or container has" in text(never)
    now = examine(good, memory=Memory(limit=need.all, available=need.all - 1))
    assert now.runs
    assert [n.what for n in now.notes] == ["memory"]
    assert examine(good, memory=Memory(limit=need.all, available=need.all)).notes == ()
    assert examine(good, memory=Memory(limit=None, available=None)).notes == ()


@pytest.mark.parametrize(("quota", "threads"), [(0.5, 1), (1.0, 1), (1.5, 1), (3.0, 3), (9.0, 8), (None, 8)])
def test_threads_follow_the_quota(good, quota, threads):
    report = examine(good, processors=Processors(cores=16, usable=8, quota=quota))
    assert report.runs
    assert report.notes == ()
    share = "" if quota is None else f", the container may keep {quota:g} of them busy"
    assert f"  threads   {threads}, on 8 of 16 cores{share}\n" in text(report)


def test_limits_that_are_too_low(good):
    """`check` prints the same sentences as `load`."""
    low = examine(good, limits=Limits(address_space=10 << 20, threads=3))
    assert not low.runs
    space, threads = low.problems
    assert space.problem.startswith("it needs ")
    assert space.problem.endswith("of address space, but this process may take only 10.5 MB more (ulimit -v)")
    assert threads.problem == (
        "XLA starts 33 threads, but this process may start only 3 more (ulimit -u, pids.max of the container)"
    )
    assert space.remedy == threads.remedy == "raise that limit, or compute with fewer threads (--threads 1)"
    assert f"! {threads.problem}" in text(low)
    assert examine(good, limits=Limits(address_space=1 << 40, threads=None)).problems == ()


@pytest.mark.parametrize(
    ("today", "when"),
    [
        (date(2026, 4, 1), "in 10 days"),
        (date(2026, 4, 10), "in 1 day"),
        (date(2026, 4, 11), "in 0 days"),
        (date(2026, 4, 12), "1 day ago"),
    ],
)
def test_a_promise_that_ends(good, today, when):
    report = examine(good, today=today)
    assert report.runs
    (note,) = report.notes
    assert note.problem == (
        f"newer jaxlibs are guaranteed to compile its StableHLO only until 2026-04-11 ({when})"
    )
    assert "precast add-target /art" in note.remedy


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_says_it_in_text_in_json_and_by_its_exit_code(
    cli, tiny_artifact, artifact_copy, edit_manifest
):
    result = cli("check", tiny_artifact)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("tiny runs here, as target cpu-")
    found = json.loads(cli("check", tiny_artifact, "--json").stdout)
    assert found["runs"] is True
    assert found["targets"][0]["mismatches"] == []
    assert found["need"]["all"] == sum(found["need"][k] for k in ("weights", "cache", "temporary"))
    edit_manifest(artifact_copy, lambda m: m["targets"][0].update(jaxlib="0.9.9"))
    assert cli("check", artifact_copy).exit_code == 1
    assert cli("check", artifact_copy, "--compile").exit_code == 0
    assert json.loads(cli("check", artifact_copy, "--json").stdout)["runs"] is False


def test_only_the_manifest_is_read(cli, tiny_artifact, tmp_path):
    (tmp_path / "manifest.json").write_bytes((tiny_artifact / "manifest.json").read_bytes())
    assert cli("check", tmp_path).exit_code == 0


def test_what_cannot_be_read_is_exit_code_2(cli, tmp_path, tiny_artifact, artifact_copy, edit_manifest):
    assert cli("check", tmp_path / "none").exit_code == 2
    result = cli("check", tiny_artifact, "--target", "gpu")
    assert result.exit_code == 2
    assert "target 'gpu' is not in the artifact; name one of its targets: 'cpu-" in result.stderr
    edit_manifest(artifact_copy, lambda m: m["targets"][0].update(stablehlo_expires="soon"))
    result = cli("check", artifact_copy)
    assert result.exit_code == 2
    assert "stablehlo_expires: expected a date such as 2027-01-31, found 'soon'" in result.stderr


def test_names_from_the_manifest_do_not_reach_the_terminal_raw(cli, artifact_copy, edit_manifest):
    edit_manifest(artifact_copy, lambda m: m.update(name="\x1b[2Jevil\n"))
    result = cli("check", artifact_copy)
    assert "\x1b" not in result.stdout
    assert "\N{REPLACEMENT CHARACTER}[2Jevil" in result.stdout.splitlines()[0]


def test_json_is_for_any_terminal(cli, tiny_artifact, artifact_copy, edit_manifest):
    edit_manifest(artifact_copy, lambda m: m.update(name="模型"))
    for command in (
        ("check", artifact_copy),
        ("inspect", artifact_copy),
        ("diff", tiny_artifact, artifact_copy),
    ):
        result = cli(*command, "--json")
        assert result.stdout.isascii()
        assert "模型" in str(json.loads(result.stdout))
