"""Errors of the command precast serve before it serves: options, missing packages, and the address."""

import importlib.util
import socket

import pytest
from click.testing import CliRunner

from precast import cli
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.serving.logs import Log
from precast.loaders.serving.server import serve
from precast.loaders.serving.settings import ServeSettings


def refusal(*arguments: object) -> str:
    result = CliRunner().invoke(cli.main, ["serve", *map(str, arguments)])
    assert result.exit_code == 2
    return result.stderr.strip()


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--max-queue", "-1", "--max-queue: expected a number from 0 to 1,000,000,000, found -1."),
        (
            "--request-timeout",
            "0",
            "--request-timeout: expected a number from 0.001 to 1,000,000,000, found 0.0.",
        ),
        ("--memory", "nan", "--memory: expected a number from 0.001 to 1,000,000,000, found nan."),
    ],
)
def test_options_out_of_range(tiny_artifact, option, value, text) -> None:
    assert refusal(tiny_artifact, option, value) == f"error: {text}"


def test_missing_packages(tiny_artifact, monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "starlette" else found(name)
    )
    assert refusal(tiny_artifact) == (
        "error: precast serve needs starlette, which is not installed: pip install 'precast[serve]'"
    )


def test_a_path_without_an_artifact(tmp_path) -> None:
    assert "expected" in refusal(tmp_path / "nothing")
    assert "Missing argument" in refusal()


def test_an_address_in_use_or_of_another_machine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PrecastError) as caught:
            serve({}, ServeSettings(port=port), Log())
        assert (
            str(caught.value)
            == f"127.0.0.1:{port}: cannot listen there (Address already in use); choose another --port."
        )
    with pytest.raises(PrecastError, match=r"^192\.0\.2\.1:8000: cannot listen there"):
        serve({}, ServeSettings(host="192.0.2.1"), Log())
