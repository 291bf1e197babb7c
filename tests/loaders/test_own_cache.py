"""The cache folder: precast does not use an untrusted cache folder, and prints a message."""

import json
import os
import stat
from pathlib import Path

import pytest

from precast.loaders import load as loading
from precast.loaders.artifact import cache_folder, files
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.compiling import cache as compile_cache
from precast.loaders.compiling import trial
from precast.loaders.store import pull as store_pull
from precast.loaders.store import push as store_push

STRANGER = 12345
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to somebody else")


def give(path: Path) -> None:
    os.lchown(path, STRANGER, -1)


def linked(folder: Path) -> None:
    """Make another user's symlink to a safe folder."""
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))
    give(folder)


def to_a_stranger_s(folder: Path) -> None:
    """Make this user's symlink to another user's folder."""
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))
    give(folder.with_name("elsewhere"))


# Untrusted cache folders, each with the expected message.
WRONG = {
    "group": (lambda folder: folder.chmod(0o770), "others may write to {folder} (mode 770)"),
    "others": (lambda folder: folder.chmod(0o707), "others may write to {folder} (mode 707)"),
    "sticky": (lambda folder: folder.chmod(0o1777), "others may write to {folder} (mode 1777)"),
    "part": (
        lambda folder: (folder / "verified").chmod(0o770),
        "others may write to {folder}/verified (mode 770)",
    ),
    "parent": (lambda folder: folder.parent.chmod(0o757), "others may write to {folder.parent} (mode 757)"),
    "owner": (give, "{folder} belongs to user 12345, but this process runs as user {me}"),
    "part's owner": (lambda folder: give(folder / "verified"), "{folder}/verified belongs to user 12345"),
    "parent's owner": (lambda folder: give(folder.parent), "{folder.parent} belongs to user 12345"),
    "link": (linked, "{folder} belongs to user 12345"),
    "link's end": (to_a_stranger_s, "{folder.parent}/elsewhere belongs to user 12345"),
}
CASES = [pytest.param(name, marks=as_root if "12345" in text else ()) for name, (_, text) in WRONG.items()]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Make a safe cache folder inside a folder that a test may change."""
    folder = tmp_path / "parent" / "cache"
    monkeypatch.setenv("PRECAST_CACHE", str(folder))
    cache_folder.make_private(folder / "verified")
    return folder


def sentence(case: str, folder: Path) -> str:
    spoil, text = WRONG[case]
    spoil(folder)
    return text.format(folder=folder, me=os.geteuid())


@pytest.mark.parametrize("case", CASES)
def test_a_folder_that_others_can_write_to_is_not_used(cache, case):
    assert cache_folder.trusted_cache("verified") == cache / "verified"
    text = sentence(case, cache)
    with pytest.raises(cache_folder.UntrustedCache) as raised:
        cache_folder.trusted_cache("verified")
    assert str(raised.value).startswith(text)
    advice = f", or run chmod -R go-w {cache}" if "mode" in text else ""
    assert str(raised.value).endswith(
        f", so nothing in the cache folder {cache} is used; set PRECAST_CACHE to a folder of your own{advice}."
    )


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o500])
@pytest.mark.parametrize("parent", [0o755, 0o775, 0o1777])
def test_a_safe_folder_is_used(cache, mode, parent):
    """A group may write to the parent: it can move the folder away, but cannot create one owned by this user."""
    cache.chmod(mode)
    cache.parent.chmod(parent)
    try:
        assert cache_folder.trusted_cache("verified") == cache / "verified"
        assert cache_folder.trusted_cache("compiled") == cache / "compiled"
    finally:
        cache.chmod(0o700)


def test_new_folders_are_private_under_any_umask(tmp_path, monkeypatch):
    monkeypatch.setenv("PRECAST_CACHE", str(tmp_path / "a" / "b"))
    before = os.umask(0)
    try:
        cache_folder.make_private(cache_folder.trusted_cache("verified"))
    finally:
        os.umask(before)
    for folder in ("a", "a/b", "a/b/verified"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700
    assert cache_folder.cache_problem("verified") is None


@pytest.fixture
def forged(cache, artifact_copy, tiny_model, monkeypatch):
    """Make a cache folder in which another user has recorded hashes of altered weights, and a trial of the target."""
    weights = artifact_copy / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"evil")
    manifest = loading.read_manifest(artifact_copy)
    identity = files._identity(weights.stat())
    note = {"sha256": manifest.files["weights.safetensors"].sha256}
    (cache / "verified" / f"{identity}.json").write_text(json.dumps(note))
    tried: list[str] = []
    monkeypatch.setattr(trial, "_attempt", lambda *_, **__: bool(tried.append("tried")) or True)
    return artifact_copy, tried


def test_an_untrusted_record_of_hashes_is_ignored(cache, forged):
    artifact, _ = forged
    said: list[str] = []
    loading.load(artifact, log=said.append)  # all files still belong to this user
    cache.chmod(0o777)
    with pytest.raises(PrecastError, match=r"'weights\.safetensors' has sha256"):
        loading.load(artifact, log=said.append)
    assert [line for line in said if "others may write" in line] == [
        f"{cache_folder.cache_problem('verified')}."
    ]


def test_an_untrusted_record_of_a_trial_is_ignored(cache, tiny_artifact, monkeypatch):
    tried: list[str] = []
    monkeypatch.setattr(trial, "_attempt", lambda *_, **__: bool(tried.append("tried")) or True)
    for _ in range(2):
        loading.load(tiny_artifact, log=lambda _: None)
    assert len(tried) == 1
    cache.chmod(0o777)
    before, said = sorted(cache.rglob("*")), []
    for _ in range(2):
        loading.load(tiny_artifact, log=said.append)
    assert len(tried) == 3
    assert said[1].endswith(
        f"and will be tried at every start, because the cache folder {cache} is not used."
    )
    assert sorted(cache.rglob("*")) == before, "nothing is written there either"


def test_no_compiled_program_is_loaded_from_an_untrusted_cache(cache, monkeypatch):
    from precast.loaders.runtime.installed import this_machine

    compiler = compile_cache._CachingCompiler(
        machine=this_machine(cuda=False), where="here", threads=1, log=lambda _: None
    )
    assert compiler._write(b"code", b"executable")
    found = compiler.cached("decode", b"code")
    assert found is not None
    assert found.executable == b"executable"
    cache.chmod(0o777)
    assert compiler.cached("decode", b"code") is None
    assert not compiler._write(b"code", b"executable")


def test_nothing_is_pulled_through_an_untrusted_cache(cache, tiny_artifact, tmp_path):
    url = f"file://{tmp_path}/store/tiny"
    store_push.push(tiny_artifact, url)
    store_pull.fetch(url, require_signature=None, log=lambda _: None)
    cache.chmod(0o777)
    for act in (
        lambda: store_pull.fetch(url, require_signature=None, log=lambda _: None),
        lambda: store_pull.pull(
            url, tmp_path / "here", overwrite=False, require_signature=None, log=lambda _: None
        ),
    ):
        with pytest.raises(PrecastError, match=r"others may write to .* \(mode 777\), so nothing"):
            act()
    assert not (tmp_path / "here").exists()


def test_the_record_of_a_url_names_its_last_artifact(cache, tiny_artifact, tmp_path, monkeypatch):
    url = f"file://{tmp_path}/store/tiny"
    store_push.push(tiny_artifact, url)
    here = store_pull.fetch(url, require_signature=None, log=lambda _: None)

    def fail(*_, **__):
        raise store_pull.UnreachableError("the store does not answer.")

    monkeypatch.setattr(store_pull, "_read_index", fail)
    assert store_pull.fetch(url, require_signature=None, log=lambda _: None) == here
    (here / "manifest.json").write_bytes((here / "manifest.json").read_bytes() + b"\n")
    with pytest.raises(PrecastError, match="does not answer"):
        store_pull.fetch(url, require_signature=None, log=lambda _: None)
