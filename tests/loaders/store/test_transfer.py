"""Push and pull: the pulled artifact is identical, and no piece is transferred twice."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.loaders.artifact.errors import PrecastError, log_to_stderr
from precast.loaders.artifact.manifest_parser import parse_manifest
from precast.loaders.store import cache as store_cache
from precast.loaders.store import index as store_index
from precast.loaders.store import push as store_push


def test_an_artifact_comes_back_as_it_was(url, tiny_artifact, tmp_path, pull, same_folder):
    pushed = store_push.push(tiny_artifact, url)
    assert (
        pushed.moved_pieces == pushed.pieces == len(list(p for p in tiny_artifact.rglob("*") if p.is_file()))
    )
    pulled = pull(url, tmp_path / "here")
    assert same_folder(tiny_artifact, tmp_path / "here")
    assert pulled.moved_pieces == pulled.pieces == pushed.pieces
    assert not any(p.is_file() for p in (store_cache.folder() / "pieces").rglob("*"))


def test_nothing_is_moved_twice(url, tiny_artifact, tmp_path, traffic, pull, same_folder):
    store_push.push(tiny_artifact, url)
    traffic.writes.clear()
    assert store_push.push(tiny_artifact, url).moved_pieces == 0
    assert traffic.writes == {"index": 1}
    pull(url, tmp_path / "here")
    traffic.reads.clear()
    assert pull(url, tmp_path / "here").moved_pieces == 0
    assert pull(url, tmp_path / "there").moved_pieces == 0  # the pieces come from the other folder
    assert traffic.reads == {"index": 2}
    assert same_folder(tmp_path / "here", tmp_path / "there")


def test_a_second_version_costs_what_changed(
    url, tiny_artifact, artifact_copy, tmp_path, pull, same_folder, replace
):
    store_push.push(tiny_artifact, url)
    pull(url, tmp_path / "here")
    replace(artifact_copy, "README.md", b"another card")
    assert store_push.push(artifact_copy, url).moved_pieces == 2  # the card and the manifest
    assert store_push.push(tiny_artifact, url + "-old").moved_pieces == 0
    with pytest.raises(PrecastError, match="exists already; choose another folder with -o, or replace it"):
        pull(url, tmp_path / "here")
    assert (
        pull(url, tmp_path / "here", overwrite=True).moved_pieces == 1
    )  # the refused pull fetched the manifest
    assert same_folder(artifact_copy, tmp_path / "here")
    (tmp_path / "empty").mkdir()
    pull(url, tmp_path / "empty")
    assert same_folder(artifact_copy, tmp_path / "empty")


def test_an_altered_tensor_costs_its_pieces_and_a_moved_one_nothing(
    folder_url, artifact_copy, monkeypatch, tmp_path, pull, replace
):
    monkeypatch.setattr(store_index, "PIECE_BYTES", 4096)
    monkeypatch.setattr(store_index, "_OWN_PIECE_BYTES", 1024)
    replace(
        artifact_copy, "README.md", (artifact_copy / "README.md").read_bytes()
    )  # only formats the manifest as json does
    first = store_push.push(artifact_copy, folder_url)
    data = (artifact_copy / "weights.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    begin, end = header["lm_head.weight"]["data_offsets"]
    assert end - begin > 2 * 4096
    at = 8 + length + begin + 5000
    replace(artifact_copy, "weights.safetensors", data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert store_push.push(artifact_copy, folder_url).moved_pieces == 2

    longer = json.dumps({"__metadata__": {"note": "x" * 100}} | header).encode()
    longer += b" " * (-(8 + len(longer)) % 64)
    moved = len(longer).to_bytes(8, "little") + longer + data[8 + length :]
    replace(artifact_copy, "weights.safetensors", moved)
    again = store_push.push(artifact_copy, folder_url)
    assert again.moved_pieces <= 3 < first.pieces / 4  # header, manifest, small tensors
    pull(folder_url, tmp_path / "here")
    assert (tmp_path / "here" / "weights.safetensors").read_bytes() == moved


@given(size=st.integers(0, 200 << 20), starts=st.lists(st.integers(-5, 300 << 20), max_size=8))
@settings(deadline=None)
def test_pieces_cover_a_file_and_begin_where_tensors_do(size, starts):
    lengths = list(store_index.lengths(size, starts))
    assert sum(lengths) == size
    assert all(0 < length <= store_index.PIECE_BYTES for length in lengths)
    ends = {sum(lengths[: i + 1]) for i in range(len(lengths))}
    assert {s for s in starts if 0 < s < size} <= ends


def test_weights_with_an_invalid_header_are_cut_anyway(tmp_path):
    huge, entry = (1 << 60).to_bytes(8, "little"), b'{"a": {"data_offsets": [0, 1.5e9]}}'
    for data in (b"", b"abc", huge, b"\2" + bytes(7) + b"[]", len(entry).to_bytes(8, "little") + entry):
        (tmp_path / "w").write_bytes(data)
        assert store_index.tensor_starts(tmp_path / "w") == []


# --- concurrent transfers ------------------------------------------------------------------------------------


def test_threads_that_pull_to_one_folder_fetch_once(url, tiny_artifact, tmp_path, pull, same_folder):
    pieces = store_push.push(tiny_artifact, url).pieces
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: pull(url, tmp_path / "here", overwrite=True), range(6)))
    assert sum(result.moved_pieces for result in results) == pieces
    assert same_folder(tiny_artifact, tmp_path / "here")


def test_processes_that_pull_to_one_folder(folder_url, tiny_artifact, tmp_path, same_folder):
    """Two processes share a cache folder; the other two have separate cache folders and do not wait."""
    store_push.push(tiny_artifact, folder_url)
    command = [sys.executable, "-m", "precast.cli", "pull", folder_url, "-o", str(tmp_path / "out" / "here")]

    def run(name: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PRECAST_CACHE": str(tmp_path / f"cache-{name}")}
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, "aabc"))
    assert [result.returncode for result in results] == [0] * 4, results
    assert same_folder(tiny_artifact, tmp_path / "out" / "here")
    assert os.listdir(tmp_path / "out") == ["here"]


def test_versions_pushed_at_the_same_time(url, tiny_artifact, tmp_path, pull, same_folder, replace):
    versions = []
    for i in range(4):
        versions.append(Path(shutil.copytree(tiny_artifact, tmp_path / f"v{i}")))
        replace(versions[-1], "README.md", b"card %d" % i)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda root: store_push.push(root, url), versions))
    pull(url, tmp_path / "here")
    assert any(same_folder(tmp_path / "here", version) for version in versions)


# --- output ---------------------------------------------------------------------------------------------------


def test_the_line_of_a_transfer_is_gone_when_it_fails(
    folder_url, tiny_artifact, tmp_path, traffic, terminal, pull
):
    store_push.push(tiny_artifact, folder_url)

    # Not after a number of pieces, because threads fetch them in a random order.
    def fail_once_shown(what, path):
        if "pulling: 0." in terminal.getvalue():
            raise PermissionError("the token has expired")

    traffic.fail = fail_once_shown
    with pytest.raises(PrecastError, match="access was refused"):
        pull(folder_url, tmp_path / "here")
    assert "pulling: 0." in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_messages_cannot_control_a_terminal(capsys):
    log_to_stderr("name \x1b]0;gone\x07\nsecond")
    assert (
        capsys.readouterr().err == "name \N{REPLACEMENT CHARACTER}]0;gone\N{REPLACEMENT CHARACTER} second\n"
    )


def test_the_manifest_of_a_pulled_artifact_is_understood(folder_url, tiny_artifact, tmp_path, cli, in_index):
    """Use the commands as the documentation does."""
    pushed = cli("push", tiny_artifact, folder_url, "--json")
    assert json.loads(pushed.stdout)["manifest"] == in_index(folder_url)["manifest"]
    pulled = cli("pull", folder_url, "-o", tmp_path / "here")
    assert "fetched 22 of 22 pieces" in pulled.stdout
    assert "MB; not signed" in pulled.stdout
    parse_manifest((tmp_path / "here" / "manifest.json").read_bytes(), "here")
