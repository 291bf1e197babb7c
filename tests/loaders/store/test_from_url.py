"""Run an artifact from its URL, with the copy in the cache folder."""

import errno
import fcntl
import os
import threading

import pytest

from precast.loaders import load as loading
from precast.loaders import signing
from precast.loaders.artifact import folders
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.store import cache as store_cache
from precast.loaders.store import pull as store_pull
from precast.loaders.store import push as store_push
from precast.loaders.store import remote as store_remote


def test_run_from_a_url(cli, url, tiny_artifact, traffic):
    store_push.push(tiny_artifact, url)
    traffic.reads.clear()
    command = ("run", url, "--ids", "1,2,3", "-n", "4")
    first = cli(*command)
    assert first.exit_code == 0, first.output
    assert f"{url}: pulled 0.6 MB into " in first.stderr
    assert traffic.reads["piece"] > 10
    traffic.reads.clear()
    second = cli(*command)
    assert traffic.reads == {"index": 1}
    local = cli("run", tiny_artifact, *command[2:])
    assert first.stdout == second.stdout == local.stdout
    assert cli("inspect", url).exit_code == 0


def test_run_from_a_url_with_a_key(cli, folder_url, artifact_copy, keys):
    signing.sign(artifact_copy, keys.maker.private, str)
    store_push.push(artifact_copy, folder_url)
    command = ("run", folder_url, "--ids", "1,2,3", "-n", "4", "--require-signature")
    refused = cli(*command, keys.other.public)
    assert refused.exit_code == 2
    assert "made with another key" in refused.stderr
    assert not (store_cache.folder() / "artifacts").exists()
    assert cli(*command, keys.maker.public).exit_code == 0


def test_a_store_that_cannot_be_reached(url, tiny_artifact, traffic):
    store_push.push(tiny_artifact, url)
    here = store_pull.fetch(url, require_signature=None, log=lambda _: None)

    def fail(what, path):
        raise ConnectionError("no route to host")

    traffic.fail, said = fail, []
    assert store_pull.fetch(url, require_signature=None, log=said.append) == here
    assert len(said) == 1
    assert "the store does not answer correctly (ConnectionError: no route to host)" in said[0]
    assert "Using the artifact that was pulled on 20" in said[0]
    with pytest.raises(PrecastError, match="the store does not answer correctly"):
        store_pull.fetch(url + "-other", require_signature=None, log=said.append)


def test_a_refusal_does_not_count_as_unreachable(url, tiny_artifact, traffic):
    store_push.push(tiny_artifact, url)
    store_pull.fetch(url, require_signature=None, log=lambda _: None)

    def fail(what, path):
        raise PermissionError("Access Denied \x1b[2J")

    traffic.fail = fail
    with pytest.raises(PrecastError, match=r"access was refused \(PermissionError: Access Denied \?\[2J\)"):
        store_pull.fetch(url, require_signature=None, log=lambda _: None)


def test_a_plain_web_server_is_a_store_to_pull_from(folder_url, tiny_artifact, tmp_path, pull, same_folder):
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    store_push.push(tiny_artifact, folder_url)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "store")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/tiny"
    try:
        pull(url, tmp_path / "here")
        assert same_folder(tiny_artifact, tmp_path / "here")
        # The server ignores ranges and sends whole files; `read` stops at the limit.
        assert len(store_remote.open_store(url).read("tiny.json", 10)) == 11
        with pytest.raises(PrecastError, match="there is no artifact of this name"):
            pull(url + "-none", tmp_path / "there")
        with pytest.raises(PrecastError, match="this store is read-only; push to another"):
            store_push.push(tiny_artifact, url + "-new")
        kept = store_pull.fetch(url, require_signature=None, log=lambda _: None)
    finally:
        server.shutdown()
        server.server_close()
    # fsspec reports "not found" for an unreachable server.
    said: list[str] = []
    assert store_pull.fetch(url, require_signature=None, log=said.append) == kept
    assert "cannot be reached" in said[0] or "does not answer" in said[0]


def test_a_withdrawn_artifact_does_not_run_from_the_cache(folder_url, tiny_artifact, tmp_path):
    store_push.push(tiny_artifact, folder_url)
    store_pull.fetch(folder_url, require_signature=None, log=lambda _: None)
    (tmp_path / "store" / "tiny.json").unlink()
    with pytest.raises(PrecastError, match="there is no artifact of this name"):
        store_pull.fetch(folder_url, require_signature=None, log=lambda _: None)


def test_a_damaged_copy_in_the_cache_is_replaced(folder_url, tiny_artifact, same_folder):
    store_push.push(tiny_artifact, folder_url)
    for break_it in (
        lambda root: (root / "tokenizer.json").unlink(),
        lambda root: (root / "weights.safetensors").write_bytes(b"short"),
        lambda root: (root / "manifest.json").unlink(),
        lambda root: (root / "manifest.json").write_text("{}"),
    ):
        here = store_pull.fetch(folder_url, require_signature=None, log=lambda _: None)
        break_it(here)
        again = store_pull.fetch(folder_url, require_signature=None, log=lambda _: None)
        assert same_folder(again, tiny_artifact)


@pytest.mark.parametrize("name", ["tokenizer.json", "weights.safetensors", "golden.json"])
def test_an_altered_file_in_the_cache_is_fetched_again(
    folder_url, tiny_artifact, traffic, name, same_folder, flip
):
    store_push.push(tiny_artifact, folder_url)
    here = store_pull.fetch(folder_url, require_signature=None, log=lambda _: None)
    flip(here / name)
    traffic.reads.clear()
    assert store_pull.fetch(folder_url, require_signature=None, log=lambda _: None) == here
    assert traffic.reads == {"index": 1, "piece": 1}
    assert same_folder(here, tiny_artifact)


def test_an_altered_file_in_the_cache_that_cannot_be_fetched(folder_url, tiny_artifact, traffic, flip):
    store_push.push(tiny_artifact, folder_url)
    here = store_pull.fetch(folder_url, require_signature=None, log=lambda _: None)
    flip(here / "tokenizer.json")

    def fail(what, path):
        raise ConnectionError("no route to host")

    traffic.fail = fail
    with pytest.raises(
        PrecastError, match=r"'tokenizer\.json' has sha256 .* remove that folder, and load the URL again\."
    ):
        loading.load(folder_url)
    with pytest.raises(PrecastError, match=r"copy or export the artifact again\.$"):
        loading.load(here)


def test_a_cache_folder_that_cannot_be_written(folder_url, tiny_artifact, tmp_path, monkeypatch, pull):
    store_push.push(tiny_artifact, folder_url)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRECAST_CACHE", str(tmp_path / "file"))
    text = r"cannot be written to \(Not a directory\); make room, or set PRECAST_CACHE"
    with pytest.raises(PrecastError, match=text):
        loading.load(folder_url)
    with pytest.raises(PrecastError, match=text):
        pull(folder_url, tmp_path / "here")


def test_a_file_system_without_locks(folder_url, tiny_artifact, tmp_path, monkeypatch, pull, same_folder):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    store_push.push(tiny_artifact, folder_url)
    monkeypatch.setattr(fcntl, "flock", refuse)
    pull(folder_url, tmp_path / "here")
    here = store_pull.fetch(folder_url, require_signature=None, log=lambda _: None)
    assert same_folder(here, tiny_artifact)
    assert same_folder(tmp_path / "here", tiny_artifact)


def test_a_folder_that_somebody_fills_is_left_alone(folder_url, tiny_artifact):
    """A locked folder, which another process may be filling, is kept; an orphaned folder is removed."""
    digest = store_push.push(tiny_artifact, folder_url).manifest
    parent = store_cache.artifact_folder(digest, store_cache.UNSIGNED).parent
    parent.mkdir(parents=True)
    left, held = (folders.temporary_name(parent, digest) for _ in "ab")
    os.close(folders.make_marked(left))
    handle = folders.make_marked(held)
    try:
        store_pull.fetch(folder_url, require_signature=None, log=lambda _: None)
    finally:
        os.close(handle)
    assert held.exists()
    assert not left.exists()
