"""Indexes written by an attacker who owns the store."""

import hashlib
import json
from pathlib import Path

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.store import cache as store_cache
from precast.loaders.store import push as store_push


def evil_manifest(change):
    """Edit both the manifest and the index, as the store's owner can."""

    def apply(index: dict, store: Path) -> None:
        entry = index["files"]["manifest.json"]
        manifest = json.loads((store / "pieces" / entry["sha256"][:2] / entry["sha256"]).read_text())
        change(manifest["files"], index["files"])
        data = json.dumps(manifest).encode()
        digest = hashlib.sha256(data).hexdigest()
        (store / "pieces" / digest[:2]).mkdir(exist_ok=True)
        (store / "pieces" / digest[:2] / digest).write_bytes(data)
        piece = {"bytes": len(data), "sha256": digest}
        index["manifest"] = digest
        index["files"]["manifest.json"] = piece | {"pieces": [piece]}

    return apply


def also_as(name: str):
    def change(listed, stored):
        listed[name], stored[name] = listed["README.md"], stored["README.md"]

    return evil_manifest(change)


def set_in(*path, value):
    def apply(index, store):
        *way, last = path
        for key in way:
            index = index[key]
        index[last] = value

    return apply


def sizes_that_add_up(index, store):
    file = index["files"]["README.md"]
    file["pieces"] = [
        {"bytes": 1, "sha256": file["sha256"]},
        {"bytes": file["bytes"] - 1, "sha256": file["sha256"]},
    ]


def other_contents(index, store):
    """Add a piece that matches its own hash but not the file."""
    data = bytes(index["files"]["README.md"]["bytes"])
    digest = hashlib.sha256(data).hexdigest()
    (store / "pieces" / digest[:2]).mkdir(exist_ok=True)
    (store / "pieces" / digest[:2] / digest).write_bytes(data)
    index["files"]["README.md"]["pieces"] = [{"bytes": len(data), "sha256": digest}]


README = ("files", "README.md")
FIRST = (*README, "pieces", 0)
HOSTILE = {
    "a name that leaves the folder": (
        also_as("../evil"),
        "'../evil' is not a valid name for a file of an artifact; push the artifact again.",
    ),
    "an absolute name": (also_as("/tmp/evil"), "'/tmp/evil' is not a valid name for a file"),
    "dots within a name": (also_as("a/../../evil"), "'a/../../evil' is not a valid name for a file"),
    "a backslash": (also_as("..\\evil"), "is not a valid name for a file"),
    "a file below a file": (also_as("README.md/evil"), "writing stopped"),
    "a manifest that lists itself": (
        evil_manifest(lambda listed, stored: listed.__setitem__("manifest.json", listed["README.md"])),
        "file 'manifest.json' differs from the manifest's entry",
    ),
    "a file that is not listed": (
        lambda index, store: index["files"].__setitem__("evil.so", index["files"]["README.md"]),
        "file 'evil.so' differs from the manifest's entry",
    ),
    "a listed file that is left out": (
        lambda index, store: index["files"].pop("README.md"),
        "file 'README.md' differs from the manifest's entry",
    ),
    "another file's contents": (
        lambda index, store: index["files"].__setitem__("README.md", index["files"]["golden.json"]),
        "file 'README.md' differs from the manifest's entry",
    ),
    "a size beyond 64 bits": (
        set_in(*FIRST, "bytes", value=2**64),
        "expected a whole number from 0 to 2^63 - 1",
    ),
    "a huge piece": (set_in(*FIRST, "bytes", value=2**62), "expected pieces of 1 to 67108864 bytes"),
    "an empty piece": (set_in(*FIRST, "bytes", value=0), "expected pieces of 1 to 67108864 bytes"),
    "sizes that do not add up": (set_in(*README, "bytes", value=7), "has 7 bytes, but its pieces have"),
    "one piece of two sizes": (sizes_that_add_up, "one piece is listed with two sizes"),
    "a path for a hash": (
        set_in(*FIRST, "sha256", value="../../../etc/passwd"),
        "expected a sha256 of 64 hex digits",
    ),
    "a piece that is not there": (set_in(*FIRST, "sha256", value="0" * 64), "pieces/00/0000"),
    "a piece with other contents": (
        other_contents,
        "the pieces of 'README.md' do not match the file's hash in the manifest; push the artifact again.",
    ),
    "a version from the future": (
        set_in("index_version", value=2),
        "expected an index of version 1, found version 2",
    ),
    "an unknown key": (
        set_in("hook", value="os.system"),
        "key 'hook' is not known to this format version; update precast, or push the artifact again.",
    ),
    "no manifest": (lambda index, store: index["files"].pop("manifest.json"), "manifest.json is missing"),
    "a manifest of another hash": (
        set_in("manifest", value="0" * 64),
        "manifest.json is listed with two hashes",
    ),
    "a signature that is a video": (
        set_in(
            "files",
            "manifest.json.sig",
            value={
                "bytes": 60 << 20,
                "sha256": "0" * 64,
                "pieces": [{"bytes": 60 << 20, "sha256": "0" * 64}],
            },
        ),
        "manifest.json.sig is larger than 1 MiB",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_index(folder_url, tiny_artifact, tmp_path, case, pull, in_index, nothing_in):
    change, text = HOSTILE[case]
    store_push.push(tiny_artifact, folder_url)
    index, store = in_index(folder_url), tmp_path / "store"
    change(index, store)
    (store / "tiny.json").write_text(json.dumps(index))
    before = sorted(p for p in tmp_path.rglob("*") if "own-cache" not in p.parts)
    with pytest.raises(PrecastError) as caught:
        pull(folder_url, tmp_path / "out" / "here")
    assert text in str(caught.value)
    assert nothing_in(tmp_path / "out")
    left = sorted(p for p in tmp_path.rglob("*") if "own-cache" not in p.parts and p != tmp_path / "out")
    assert left == before
    assert not (store_cache.folder().parent / "evil").exists()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "expected JSON"),
        (b"<html>not found</html>", "expected JSON"),
        (b"[]", "expected an index of version 1, found none"),
        (b'{"index_version": 1, "index_version": 1}', "a key occurs twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * ((16 << 20) + 1), "expected at most 16777216 bytes of JSON"),
        (b"\xff\xfe", "expected JSON"),
    ],
    ids=["empty", "HTML", "a list", "a key twice", "nesting", "size", "no UTF-8"],
)
def test_malformed_indexes_are_refused(folder_url, tmp_path, data, text, pull):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "tiny.json").write_bytes(data)
    with pytest.raises(PrecastError, match=text):
        pull(folder_url, tmp_path / "here")
