"""API keys from files and the environment, and the names under which a local server may be addressed."""

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.serving.access import check_host, read_keys
from precast.loaders.serving.errors import ApiError


def test_keys_of_a_file_or_the_environment(tmp_path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\none\n\n two \n  # theirs\n")
    assert read_keys(path, {"PRECAST_API_KEYS": "three"}) == (b"one", b"two")
    assert read_keys(None, {"PRECAST_API_KEYS": "one, two,"}) == (b"one", b"two")
    assert read_keys(None, {}) == ()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read (No such file or directory); check --api-key-file."),
        (b"", "expected at least one API key, found none; write one per line."),
        (b"\xff", "cannot be read (it is not UTF-8 text); check --api-key-file."),
        ("clé".encode(), "expected API keys of printable ASCII characters; replace the key."),
        (b"# none\n\n", "expected at least one API key, found none; write one per line."),
        (b"one two\n", "expected API keys without spaces; write one per line."),
        (b"one\ttwo", "expected API keys without spaces; write one per line."),
    ],
)
def test_unusable_files(tmp_path, content, text) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PrecastError) as caught:
        read_keys(path, {})
    assert str(caught.value) == f"{path}: {text}"


@pytest.mark.parametrize("value", ["", " , "])
def test_a_variable_without_a_key(value) -> None:
    """An empty secret must not open the server."""
    with pytest.raises(PrecastError, match=r"^PRECAST_API_KEYS: expected at least one API key, found none; "):
        read_keys(None, {"PRECAST_API_KEYS": value})


def test_the_configured_name_is_accepted() -> None:
    check_host({"host": "Box:8000"}, "127.0.1.1", "box")
    check_host({"host": "localhost"}, "127.0.1.1", "box")
    with pytest.raises(ApiError, match="must name this machine"):
        check_host({"host": "evil.example"}, "127.0.1.1", "box")


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "127.9.9.9", "LOCALHOST"]
)
def test_names_of_this_machine(host) -> None:
    check_host({"host": host}, "127.0.0.1")
    check_host({}, "127.0.0.1")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "10.0.0.1", "localhost.evil.example", "[::2]", ""]
)
def test_names_of_others(host) -> None:
    check_host({"host": host}, "0.0.0.0")
    with pytest.raises(ApiError, match="must name this machine"):
        check_host({"host": host}, "127.0.0.1")


def test_fault_18_a_foreign_name_is_refused_by_the_server(tiny_server) -> None:
    status, _, body = tiny_server.request("/v1/models", headers={"host": "evil.example"})
    assert (status, body["error"]["code"]) == (403, "host_not_allowed")
    assert tiny_server.request("/health", headers={"host": "10.0.0.1"})[0] == 200
