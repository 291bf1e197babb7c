"""Interrupted transfers, and damaged stores, folders, and disks."""

import hashlib
import json
import os
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.store import cache as store_cache
from precast.loaders.store import pull as store_pull
from precast.loaders.store import push as store_push
from precast.loaders.store import remote as store_remote


def stop_after(traffic, what: str, count: int) -> None:
    """Make every transfer of a piece fail permanently after the first `count` pieces."""
    passed: set[str] = set()

    def fail(now, path):
        if now == what and "/pieces/" in path and path not in passed:
            if len(passed) == count:
                raise PermissionError("the token has expired")
            passed.add(path)  # a retry of this piece passes too

    traffic.fail = fail


def test_an_interrupted_pull_goes_on_where_it_stopped(
    url, tiny_artifact, tmp_path, traffic, pull, same_folder, nothing_in
):
    pieces = store_push.push(tiny_artifact, url).pieces
    stop_after(traffic, "read", 7)
    with pytest.raises(PrecastError, match="access was refused"):
        pull(url, tmp_path / "out" / "here")
    assert nothing_in(tmp_path / "out")
    traffic.fail = lambda what, path: None
    assert pull(url, tmp_path / "out" / "here").moved_pieces == pieces - 7
    assert same_folder(tiny_artifact, tmp_path / "out" / "here")


def test_an_interrupted_push_shows_nothing_and_goes_on_where_it_stopped(
    url, tiny_artifact, tmp_path, traffic, pull, same_folder
):
    stop_after(traffic, "write", 5)
    with pytest.raises(PrecastError, match="access was refused"):
        store_push.push(tiny_artifact, url)
    with pytest.raises(PrecastError, match="there is no artifact of this name"):
        pull(url, tmp_path / "here")
    traffic.fail = lambda what, path: None
    again = store_push.push(tiny_artifact, url)
    assert again.moved_pieces == again.pieces - 5
    pull(url, tmp_path / "here")
    assert same_folder(tiny_artifact, tmp_path / "here")


def test_a_connection_that_comes_back(url, tiny_artifact, tmp_path, traffic, pull, same_folder):
    failures = Counter()

    def fail(what, path):
        failures[path] += 1
        if failures[path] % 4:
            raise ConnectionError("reset by peer")

    traffic.fail = fail
    store_push.push(tiny_artifact, url)
    pull(url, tmp_path / "here")
    assert same_folder(tiny_artifact, tmp_path / "here")


def test_a_pull_that_was_killed_leaves_pieces_that_are_checked(
    folder_url, tiny_artifact, tmp_path, pull, same_folder, pieces_of
):
    store_push.push(tiny_artifact, folder_url)
    for piece in pieces_of(folder_url):
        kept = store_cache.folder() / "pieces" / piece.parent.name / piece.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(bytes(piece.stat().st_size))  # a power cut can leave zeros
    assert pull(folder_url, tmp_path / "here").moved_pieces == len(pieces_of(folder_url))
    assert same_folder(tiny_artifact, tmp_path / "here")


def test_orphaned_pieces_are_removed(folder_url, tiny_artifact, tmp_path, pull):
    store_push.push(tiny_artifact, folder_url)
    pieces = store_cache.folder() / "pieces" / "ab"
    pieces.mkdir(parents=True)
    ages = {"abc": 31 * 86400, "abd": 86400, ".abe.xyz": 7200, ".abf.xyz": 60}
    for name, age in ages.items():
        (pieces / name).write_bytes(b"x")
        os.utime(pieces / name, (time.time() - age,) * 2)
    pull(folder_url, tmp_path / "here")
    assert sorted(os.listdir(pieces)) == [".abf.xyz", "abd"]


@pytest.mark.parametrize("damage", ["altered", "shorter", "longer", "missing"])
def test_a_damaged_piece_is_refused_and_can_be_repaired(
    folder_url, tiny_artifact, tmp_path, damage, pull, same_folder, pieces_of, nothing_in
):
    store_push.push(tiny_artifact, folder_url)
    piece = max(pieces_of(folder_url), key=lambda p: p.stat().st_size)
    data = piece.read_bytes()
    if damage == "missing":
        piece.unlink()
    else:
        ends = {"altered": data[:-1] + bytes([data[-1] ^ 1]), "shorter": data[:-1], "longer": data + b"x"}
        piece.write_bytes(ends[damage])
    text = "does not exist" if damage == "missing" else "is damaged: its hash differs from its name"
    with pytest.raises(PrecastError, match=text):
        pull(folder_url, tmp_path / "out" / "here")
    assert nothing_in(tmp_path / "out")
    assert store_push.push(tiny_artifact, folder_url, rehash=damage == "altered").moved_pieces == 1
    pull(folder_url, tmp_path / "out" / "here")
    assert same_folder(tiny_artifact, tmp_path / "out" / "here")


def test_an_altered_artifact_is_not_pushed(folder_url, artifact_copy, tmp_path):
    (artifact_copy / "README.md").write_text("another card")
    with pytest.raises(
        PrecastError, match=r"'README\.md' is damaged: its hash differs from the manifest's; copy"
    ):
        store_push.push(artifact_copy, folder_url)
    (artifact_copy / "README.md").unlink()
    (tmp_path / "secret").write_text("secret")
    (artifact_copy / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(PrecastError, match="to be a plain file inside the artifact"):
        store_push.push(artifact_copy, folder_url)
    assert not (tmp_path / "store" / "tiny.json").exists()


def test_a_piece_is_not_read_beyond_its_size(url, tiny_artifact, monkeypatch, tmp_path, pull):
    store_push.push(tiny_artifact, url)
    store = store_remote.open_store(url)
    digest = json.loads(store.read("tiny.json", 1 << 20))["files"]["README.md"]["sha256"]
    store.write(f"pieces/{digest[:2]}/{digest}", b"x" * 100_000)
    sizes, check = [], hashlib.sha256
    monkeypatch.setattr(store_pull.hashlib, "sha256", lambda data=b"": sizes.append(len(data)) or check(data))
    with pytest.raises(PrecastError, match="is damaged: its hash differs from its name"):
        pull(url, tmp_path / "here")
    assert 100_000 not in sizes
    assert len(store.read(f"pieces/{digest[:2]}/{digest}", 10)) == 11


def test_more_than_the_disk_holds_is_refused_before_the_first_piece(
    folder_url, tiny_artifact, tmp_path, monkeypatch, traffic, pull
):
    store_push.push(tiny_artifact, folder_url)
    monkeypatch.setattr(store_pull.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        PrecastError, match=r"pulling takes \d\.\d MB in .*, but only 0\.0 MB are free; make room"
    ):
        pull(folder_url, tmp_path / "here")
    assert traffic.reads == {"index": 1, "piece": 1}


def test_a_folder_that_is_no_artifact_is_left_alone(folder_url, tiny_artifact, tmp_path, pull):
    store_push.push(tiny_artifact, folder_url)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for folder in (tmp_path / "mine", tmp_path / "link"):
        with pytest.raises(PrecastError, match="is not an artifact, so --overwrite does not replace it"):
            pull(folder_url, folder, overwrite=True)
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]
