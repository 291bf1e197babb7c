"""Signatures in a store: they are checked first, can be renewed, and are never replaced by invalid ones."""

import errno

import pytest

from precast.loaders import load as loading
from precast.loaders import signing
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.store import pull as store_pull
from precast.loaders.store import push as store_push


def test_a_signature_travels_along_and_is_checked_first(
    url, artifact_copy, tmp_path, traffic, keys, pull, same_folder
):
    store_push.push(artifact_copy, url)
    with pytest.raises(PrecastError, match=r"expected a signature, found no manifest\.json\.sig"):
        pull(url, tmp_path / "here", key=keys.maker.public)
    assert traffic.reads == {"index": 1, "piece": 1}
    signing.sign(artifact_copy, keys.maker.private, str)
    assert store_push.push(artifact_copy, url).moved_pieces == 1
    traffic.reads.clear()
    with pytest.raises(PrecastError, match="made with another key"):
        pull(url, tmp_path / "here", key=keys.other.public)
    assert traffic.reads == {"index": 1, "piece": 1}
    assert pull(url, tmp_path / "here", key=keys.maker.public).signed
    assert same_folder(artifact_copy, tmp_path / "here")
    loading.read_manifest(tmp_path / "here", require_signature=keys.maker.public)


def test_a_signature_over_another_manifest_is_not_pushed(folder_url, artifact_copy, keys, replace):
    signing.sign(artifact_copy, keys.maker.private, str)
    replace(artifact_copy, "README.md", b"another card")
    with pytest.raises(
        PrecastError, match=r"does not match manifest\.json, which has changed since it was signed; sign"
    ):
        store_push.push(artifact_copy, folder_url)


def test_an_artifact_signed_later_is_not_fetched_again(url, artifact_copy, keys, traffic, tmp_path, pull):
    store_push.push(artifact_copy, url)
    store_pull.fetch(url, require_signature=None, log=lambda _: None)
    pull(url, tmp_path / "here")
    signing.sign(artifact_copy, keys.maker.private, str)
    store_push.push(artifact_copy, url)
    traffic.reads.clear()
    here = store_pull.fetch(url, require_signature=keys.maker.public, log=lambda _: None)
    assert traffic.reads == {"index": 1, "piece": 1}
    loading.read_manifest(here, require_signature=keys.maker.public)
    pull(url, tmp_path / "here")
    loading.read_manifest(tmp_path / "here", require_signature=keys.maker.public)


@pytest.mark.parametrize(
    ("by_other", "with_key", "text"),
    [
        (True, True, "made with another key"),
        (False, True, "is not the one that was signed"),
        (
            False,
            False,
            "manifest.json.sig does not match the manifest.json in the store; sign the artifact and push it",
        ),
    ],
)
def test_an_invalid_signature_replaces_nothing(
    folder_url, artifact_copy, keys, tmp_path, by_other, with_key, text, pull, replace, put_signature
):
    key = keys.maker.public if with_key else None
    signing.sign(artifact_copy, keys.maker.private, str)
    good = (artifact_copy / "manifest.json.sig").read_bytes()
    store_push.push(artifact_copy, folder_url)
    here = store_pull.fetch(folder_url, require_signature=key, log=lambda _: None)
    pull(folder_url, tmp_path / "here", key=key)
    if not by_other:
        replace(artifact_copy, "README.md", b"another card")
    signing.sign(artifact_copy, keys.other.private if by_other else keys.maker.private, str)
    put_signature(folder_url, (artifact_copy / "manifest.json.sig").read_bytes())
    said = []
    assert store_pull.fetch(folder_url, require_signature=key, log=said.append) == here
    assert len(said) == 1
    assert text in said[0]
    assert said[0].endswith("Using the artifact that was pulled before.")
    for folder in (tmp_path / "here", tmp_path / "there"):
        with pytest.raises(PrecastError, match=text):
            pull(folder_url, folder, key=key)
    assert not (tmp_path / "there").exists()
    for folder in (here, tmp_path / "here"):
        assert (folder / "manifest.json.sig").read_bytes() == good
        loading.read_manifest(folder, require_signature=keys.maker.public)


def test_a_signature_that_cannot_be_written_is_logged(
    folder_url, artifact_copy, keys, tmp_path, monkeypatch, pull
):
    store_push.push(artifact_copy, folder_url)
    here = store_pull.fetch(folder_url, require_signature=None, log=lambda _: None)
    pull(folder_url, tmp_path / "here")
    signing.sign(artifact_copy, keys.maker.private, str)
    store_push.push(artifact_copy, folder_url)
    write, said = store_pull.files.write_atomically, []

    def refuse(path, data):
        if path.name == "manifest.json.sig":
            raise OSError(errno.EROFS, "Read-only file system")
        write(path, data)

    monkeypatch.setattr(store_pull.files, "write_atomically", refuse)
    assert store_pull.fetch(folder_url, require_signature=None, log=said.append) == here
    assert f"{here}/manifest.json.sig: cannot be written (Read-only file system); check" in said[0]
    with pytest.raises(PrecastError, match="cannot be written"):
        pull(folder_url, tmp_path / "here")
