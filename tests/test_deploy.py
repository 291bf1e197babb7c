"""The files in deploy/ agree with each other, with pyproject.toml and with the command line."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from precast import cli

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
USER = "10001"


def stages() -> list[list[tuple[str, str]]]:
    """Return the instructions of each stage of the Dockerfile; the first list precedes all stages."""
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text())
    found: list[list[tuple[str, str]]] = [[]]
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        name, _, value = line.partition(" ")
        if name == "FROM":
            found.append([])
        found[-1].append((name, value.strip()))
    return found


def values(stage: list[tuple[str, str]], name: str) -> list[str]:
    return [value for instruction, value in stage if instruction == name]


def arguments() -> dict[str, str]:
    given = [value for stage in stages() for value in values(stage, "ARG")]
    return {name: value for name, _, value in (one.partition("=") for one in given)}


def service() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "precast.service").read_text().splitlines():
        if re.match(r"\w+=", line):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.fixture
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["precast"]


def serve_options() -> dict[str, click.Parameter]:
    command = cli.main.get_command(click.Context(cli.main), "serve")
    assert command is not None
    return {text: parameter for parameter in command.params for text in parameter.opts}


def check_command(words: list[str]) -> None:
    assert words[0].rpartition("/")[2] == "precast"
    assert words[1] == "serve"
    assert {word for word in words if word.startswith("--")} <= serve_options().keys()


def test_versions_of_the_image(project) -> None:
    versions = arguments()
    assert f"{versions['PYTHON']}.0" in SpecifierSet(project["project"]["requires-python"])
    (jaxlib,) = (r for r in map(Requirement, project["project"]["dependencies"]) if r.name == "jaxlib")
    assert versions["JAXLIB"] in jaxlib.specifier
    assert re.search(r"^jaxlib==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for stage in stages()[1:]:
        assert values(stage, "FROM")[0].partition(" ")[0] == "python:${PYTHON}-slim"


def test_the_image_contains_the_server_alone(project) -> None:
    _, build, last = stages()
    (extras,) = re.findall(r"precast-\*\.whl\)\[([\w,-]+)\]", " ".join(values(build, "RUN")))
    chosen = set(extras.split(","))
    assert chosen == {"serve", "grammar"}
    known = project["project"]["optional-dependencies"]
    names = {Requirement(one).name for extra in chosen for one in known[extra]}
    assert "jax" not in names
    assert not re.search(r"\bpip\b|\bapt-get\b|\bcurl\b", " ".join(values(last, "RUN")))
    assert values(last, "COPY") == ["--from=build /opt/precast /opt/precast"]


def test_the_image_runs_as_a_user_and_without_a_shell() -> None:
    last = stages()[-1]
    assert values(last, "USER") == [f"{USER}:{USER}"]
    (entry,), (command,) = values(last, "ENTRYPOINT"), values(last, "CMD")
    check_command([*json.loads(entry), *json.loads(command)])
    assert json.loads(command) == ["/models"]
    assert values(last, "STOPSIGNAL") == ["SIGTERM"]
    (cache,) = (value.partition("=")[2] for value in values(last, "ENV") if value.startswith("PRECAST_CACHE"))
    assert cache.startswith("/cache/")


def test_the_image_checks_its_health(compose) -> None:
    (check,) = values(stages()[-1], "HEALTHCHECK")
    words = json.loads(check.partition("CMD")[2])
    assert words[0] == "python3"
    compile(words[2], "HEALTHCHECK", "exec")
    assert "http://127.0.0.1:8000/ready" in words[2]
    assert compose["healthcheck"]["test"] == ["CMD", *words]
    assert serve_options()["--port"].default == 8000


def test_the_context_contains_all_packages(project) -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    kept = {line[2:] for line in lines if line.startswith("!/")}
    folders = {path.partition("/")[0] for path in project["tool"]["setuptools"]["package-dir"].values()}
    assert folders - {"."} <= kept
    assert all(any(ROOT.glob(name)) for name in kept)
    assert {"pyproject.toml", "constraints.txt", "*.py", "README.md", "LICENSE"} <= kept
    assert "*" in lines


def test_compose(compose) -> None:
    assert (compose["read_only"], compose["cap_drop"]) == (True, ["ALL"])
    assert compose["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"\d+g", compose["mem_limit"])
    assert compose["ports"] == ["127.0.0.1:8000:8000"]
    assert [volume.rpartition("/models:")[2] for volume in compose["volumes"]] == ["ro"]
    (cache,) = (mount for mount in compose["tmpfs"] if mount.startswith("/cache:"))
    assert {f"uid={USER}", f"gid={USER}", "mode=0700"} <= set(cache.partition(":")[2].split(","))
    assert "PRECAST_API_KEYS" in compose["environment"]
    build = compose["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"


def test_the_service() -> None:
    found = service()
    check_command(shlex.split(found["ExecStart"][0]))
    wanted = {
        "DynamicUser": "yes",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "CapabilityBoundingSet": "",
        "KillSignal": "SIGTERM",
        "Restart": "on-failure",
        "CacheDirectory": "precast",
        "Environment": "PRECAST_CACHE=%C/precast",
    }
    assert {name: found.get(name) for name in wanted} == {name: [value] for name, value in wanted.items()}


def test_nothing_kills_the_server_before_its_answers_are_complete(compose) -> None:
    drain = serve_options()["--drain-timeout"].default
    assert int(service()["TimeoutStopSec"][0]) > drain
    assert int(compose["stop_grace_period"].removesuffix("s")) > drain
