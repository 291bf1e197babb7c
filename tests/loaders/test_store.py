"""Stores: what is pushed comes back to the byte, what is there is not moved twice, and nothing hostile gets through."""

import errno
import fcntl
import filecmp
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from precast.loaders import load as loading
from precast.loaders import signing
from precast.loaders.artifact import folders
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest_parser import parse_manifest
from precast.loaders.console import store as store_console
from precast.loaders.store import cache as store_cache
from precast.loaders.store import index as store_index
from precast.loaders.store import pull as store_pull
from precast.loaders.store import push as store_push
from precast.loaders.store import remote as store_remote

BUCKET = "models"


@pytest.fixture(scope="module")
def s3_server():
    """A server that speaks S3, with an empty bucket, and the environment that leads to it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3", use_listings_cache=False).mkdir(BUCKET)
        yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@pytest.fixture(params=["file", "memory", "s3"])
def url(request, tmp_path) -> str:
    """Where to push to, in an empty store of each kind."""
    if request.param == "s3":
        request.getfixturevalue("s3_server")
        return f"s3://{BUCKET}/{tmp_path.name}/tiny"
    return f"{request.param}://{tmp_path}/store/tiny"


@pytest.fixture
def folder_url(tmp_path) -> str:
    return f"file://{tmp_path}/store/tiny"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch, own_cache):
    """Attempts follow one another at once, and every test has a cache of its own."""
    monkeypatch.setattr(store_remote, "_WAITS", (0.0, 0.0, 0.0))


@pytest.fixture
def traffic(monkeypatch) -> SimpleNamespace:
    """Counts what is read from stores and written to them, by kind of path, and can make them fail."""
    found = SimpleNamespace(reads=Counter(), writes=Counter(), fail=lambda what, path: None)
    lock, read, write = threading.Lock(), store_remote.Store._read, store_remote.Store._write

    def count(counter, what, path):
        with lock:
            found.fail(what, path)
            counter["piece" if "/pieces/" in path else "index"] += 1

    def counted_read(self, path, most):
        count(found.reads, "read", path)
        return read(self, path, most)

    def counted_write(self, path, data):
        count(found.writes, "write", path)
        return write(self, path, data)

    monkeypatch.setattr(store_remote.Store, "_read", counted_read)
    monkeypatch.setattr(store_remote.Store, "_write", counted_write)
    return found


def pull(url: str, folder: Path, *, overwrite=False, key=None):
    return store_pull.pull(url, folder, overwrite=overwrite, require_signature=key, log=lambda _: None)


def same_folder(a: Path, b: Path) -> bool:
    def names(root):
        return sorted(p.relative_to(root) for p in root.rglob("*"))

    files = [str(n) for n in names(a) if (a / n).is_file()]
    return names(a) == names(b) and filecmp.cmpfiles(a, b, files, shallow=False)[1:] == ([], [])


def replace(root: Path, name: str, data: bytes) -> None:
    """Another version of an artifact: one file differs, and the manifest says so."""
    (root / name).write_bytes(data)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (root / "manifest.json").write_text(json.dumps(manifest))


def pieces_of(url: str) -> list[Path]:
    store = Path(url.removeprefix("file://")).parent
    return sorted(p for p in (store / "pieces").rglob("*") if p.is_file())


def in_index(url: str) -> dict:
    return json.loads(Path(f"{url.removeprefix('file://')}.json").read_text())


def nothing_in(folder: Path) -> bool:
    return not folder.exists() or os.listdir(folder) == []


# --- there and back -----------------------------------------------------------------------------------------


def test_an_artifact_comes_back_as_it_was(url, tiny_artifact, tmp_path):
    pushed = store_push.push(tiny_artifact, url)
    assert (
        pushed.moved_pieces == pushed.pieces == len(list(p for p in tiny_artifact.rglob("*") if p.is_file()))
    )
    pulled = pull(url, tmp_path / "here")
    assert same_folder(tiny_artifact, tmp_path / "here")
    assert pulled.moved_pieces == pulled.pieces == pushed.pieces
    assert not any(p.is_file() for p in (store_cache.folder() / "pieces").rglob("*"))


def test_nothing_is_moved_twice(url, tiny_artifact, tmp_path, traffic):
    store_push.push(tiny_artifact, url)
    traffic.writes.clear()
    assert store_push.push(tiny_artifact, url).moved_pieces == 0
    assert traffic.writes == {"index": 1}
    pull(url, tmp_path / "here")
    traffic.reads.clear()
    assert pull(url, tmp_path / "here").moved_pieces == 0
    assert pull(url, tmp_path / "there").moved_pieces == 0  # what is in another folder is near enough
    assert traffic.reads == {"index": 2}
    assert same_folder(tmp_path / "here", tmp_path / "there")


def test_a_second_version_costs_what_changed(url, tiny_artifact, artifact_copy, tmp_path):
    store_push.push(tiny_artifact, url)
    pull(url, tmp_path / "here")
    replace(artifact_copy, "README.md", b"another card")
    assert store_push.push(artifact_copy, url).moved_pieces == 2  # it and the manifest
    assert store_push.push(tiny_artifact, url + "-old").moved_pieces == 0
    with pytest.raises(PrecastError, match="exists already; choose another folder with -o, or replace it"):
        pull(url, tmp_path / "here")
    assert (
        pull(url, tmp_path / "here", overwrite=True).moved_pieces == 1
    )  # the manifest came with the refusal
    assert same_folder(artifact_copy, tmp_path / "here")
    (tmp_path / "empty").mkdir()
    pull(url, tmp_path / "empty")
    assert same_folder(artifact_copy, tmp_path / "empty")


def test_an_altered_tensor_costs_its_pieces_and_a_moved_one_nothing(
    folder_url, artifact_copy, monkeypatch, tmp_path
):
    monkeypatch.setattr(store_index, "PIECE_BYTES", 4096)
    monkeypatch.setattr(store_index, "_OWN_PIECE_BYTES", 1024)
    replace(
        artifact_copy, "README.md", (artifact_copy / "README.md").read_bytes()
    )  # the manifest as json writes it
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


def test_weights_that_are_not_understood_are_cut_all_the_same(tmp_path):
    huge, entry = (1 << 60).to_bytes(8, "little"), b'{"a": {"data_offsets": [0, 1.5e9]}}'
    for data in (b"", b"abc", huge, b"\2" + bytes(7) + b"[]", len(entry).to_bytes(8, "little") + entry):
        (tmp_path / "w").write_bytes(data)
        assert store_index.tensor_starts(tmp_path / "w") == []


# --- interrupted, altered, hostile --------------------------------------------------------------------------


def stop_after(traffic, what: str, count: int) -> None:
    """Makes the store lose its pieces' connection for good after some of them, whichever threads get there first."""
    passed: set[str] = set()

    def fail(now, path):
        if now == what and "/pieces/" in path and path not in passed:
            if len(passed) == count:
                raise PermissionError("the token has expired")
            passed.add(path)  # and so does another attempt at it

    traffic.fail = fail


def test_an_interrupted_pull_goes_on_where_it_stopped(url, tiny_artifact, tmp_path, traffic):
    pieces = store_push.push(tiny_artifact, url).pieces
    stop_after(traffic, "read", 7)
    with pytest.raises(PrecastError, match="access was refused"):
        pull(url, tmp_path / "out" / "here")
    assert nothing_in(tmp_path / "out")
    traffic.fail = lambda what, path: None
    assert pull(url, tmp_path / "out" / "here").moved_pieces == pieces - 7
    assert same_folder(tiny_artifact, tmp_path / "out" / "here")


def test_an_interrupted_push_shows_nothing_and_goes_on_where_it_stopped(
    url, tiny_artifact, tmp_path, traffic
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


def test_a_connection_that_comes_back(url, tiny_artifact, tmp_path, traffic):
    failures = Counter()

    def fail(what, path):
        failures[path] += 1
        if failures[path] % 4:
            raise ConnectionError("reset by peer")

    traffic.fail = fail
    store_push.push(tiny_artifact, url)
    pull(url, tmp_path / "here")
    assert same_folder(tiny_artifact, tmp_path / "here")


def test_a_pull_that_was_killed_leaves_pieces_that_are_checked(folder_url, tiny_artifact, tmp_path):
    store_push.push(tiny_artifact, folder_url)
    for piece in pieces_of(folder_url):
        kept = store_cache.folder() / "pieces" / piece.parent.name / piece.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(bytes(piece.stat().st_size))  # as a power cut may leave them
    assert pull(folder_url, tmp_path / "here").moved_pieces == len(pieces_of(folder_url))
    assert same_folder(tiny_artifact, tmp_path / "here")


def test_what_pulls_left_behind_is_removed_some_day(folder_url, tiny_artifact, tmp_path):
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
def test_a_damaged_piece_is_refused_and_can_be_mended(folder_url, tiny_artifact, tmp_path, damage):
    store_push.push(tiny_artifact, folder_url)
    piece = max(pieces_of(folder_url), key=lambda p: p.stat().st_size)
    data = piece.read_bytes()
    if damage == "missing":
        piece.unlink()
    else:
        ends = {"altered": data[:-1] + bytes([data[-1] ^ 1]), "shorter": data[:-1], "longer": data + b"x"}
        piece.write_bytes(ends[damage])
    text = "is not there" if damage == "missing" else "is not what its name says, it is altered or cut short"
    with pytest.raises(PrecastError, match=text):
        pull(folder_url, tmp_path / "out" / "here")
    assert nothing_in(tmp_path / "out")
    assert store_push.push(tiny_artifact, folder_url, verify=damage == "altered").moved_pieces == 1
    pull(folder_url, tmp_path / "out" / "here")
    assert same_folder(tiny_artifact, tmp_path / "out" / "here")


def test_an_altered_artifact_is_not_pushed(folder_url, artifact_copy, tmp_path):
    (artifact_copy / "README.md").write_text("another card")
    with pytest.raises(PrecastError, match=r"'README\.md' is not what the manifest says; it was altered"):
        store_push.push(artifact_copy, folder_url)
    (artifact_copy / "README.md").unlink()
    (tmp_path / "secret").write_text("secret")
    (artifact_copy / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(PrecastError, match="is not a plain file inside the artifact"):
        store_push.push(artifact_copy, folder_url)
    assert not (tmp_path / "store" / "tiny.json").exists()


def evil_manifest(change):
    """Changes manifest and index alike: whoever owns the store may write both."""

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
    """A piece that is what its name says, and not what the file says."""
    data = bytes(index["files"]["README.md"]["bytes"])
    digest = hashlib.sha256(data).hexdigest()
    (store / "pieces" / digest[:2]).mkdir(exist_ok=True)
    (store / "pieces" / digest[:2] / digest).write_bytes(data)
    index["files"]["README.md"]["pieces"] = [{"bytes": len(data), "sha256": digest}]


README = ("files", "README.md")
FIRST = (*README, "pieces", 0)
HOSTILE = {
    "a name that leaves the folder": (also_as("../evil"), "'../evil' is not the name of a file inside"),
    "an absolute name": (also_as("/tmp/evil"), "'/tmp/evil' is not the name of a file inside"),
    "dots within a name": (also_as("a/../../evil"), "'a/../../evil' is not the name of a file inside"),
    "a backslash": (also_as("..\\evil"), "is not the name of a file inside"),
    "a file below a file": (also_as("README.md/evil"), "writing stopped"),
    "a manifest that lists itself": (
        evil_manifest(lambda listed, stored: listed.__setitem__("manifest.json", listed["README.md"])),
        "its file 'manifest.json' is not the one that the manifest lists",
    ),
    "a file that is not listed": (
        lambda index, store: index["files"].__setitem__("evil.so", index["files"]["README.md"]),
        "its file 'evil.so' is not the one that the manifest lists",
    ),
    "a listed file that is left out": (
        lambda index, store: index["files"].pop("README.md"),
        "its file 'README.md' is not the one that the manifest lists",
    ),
    "another file's contents": (
        lambda index, store: index["files"].__setitem__("README.md", index["files"]["golden.json"]),
        "its file 'README.md' is not the one that the manifest lists",
    ),
    "a size beyond 64 bits": (
        set_in(*FIRST, "bytes", value=2**64),
        "expected a whole number from 0 to 2^63 - 1",
    ),
    "a huge piece": (set_in(*FIRST, "bytes", value=2**62), "expected pieces of 1 to 67108864 bytes"),
    "an empty piece": (set_in(*FIRST, "bytes", value=0), "expected pieces of 1 to 67108864 bytes"),
    "sizes that do not add up": (set_in(*README, "bytes", value=7), "has 7 bytes, its pieces have"),
    "one piece of two sizes": (sizes_that_add_up, "one piece has two sizes"),
    "a path for a hash": (
        set_in(*FIRST, "sha256", value="../../../etc/passwd"),
        "expected sha256 as 64 hex digits",
    ),
    "a piece that is not there": (set_in(*FIRST, "sha256", value="0" * 64), "pieces/00/0000"),
    "a piece with other contents": (other_contents, "the pieces of 'README.md' do not make the file"),
    "a version from the future": (
        set_in("index_version", value=2),
        "expected an index of version 1, found version 2",
    ),
    "an unknown key": (set_in("hook", value="os.system"), "key 'hook' is not known"),
    "no manifest": (lambda index, store: index["files"].pop("manifest.json"), "it names no manifest.json"),
    "a manifest of another hash": (set_in("manifest", value="0" * 64), "it names no manifest.json"),
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
        "manifest.json.sig is larger than any signature",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_index(folder_url, tiny_artifact, tmp_path, case):
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
def test_what_is_no_index(folder_url, tmp_path, data, text):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "tiny.json").write_bytes(data)
    with pytest.raises(PrecastError, match=text):
        pull(folder_url, tmp_path / "here")


def test_a_piece_is_not_read_beyond_its_size(url, tiny_artifact, monkeypatch, tmp_path):
    store_push.push(tiny_artifact, url)
    store = store_remote.open_store(url)
    digest = json.loads(store.read("tiny.json", 1 << 20))["files"]["README.md"]["sha256"]
    store.write(f"pieces/{digest[:2]}/{digest}", b"x" * 100_000)
    sizes, check = [], hashlib.sha256
    monkeypatch.setattr(store_pull.hashlib, "sha256", lambda data=b"": sizes.append(len(data)) or check(data))
    with pytest.raises(PrecastError, match="altered or cut short"):
        pull(url, tmp_path / "here")
    assert 100_000 not in sizes
    assert len(store.read(f"pieces/{digest[:2]}/{digest}", 10)) == 11


def test_more_than_the_disk_holds_is_refused_before_the_first_piece(
    folder_url, tiny_artifact, tmp_path, monkeypatch, traffic
):
    store_push.push(tiny_artifact, folder_url)
    monkeypatch.setattr(store_pull.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(
        PrecastError, match=r"pulling it takes \d\.\d MB in .*, where 0\.0 MB are free; make room"
    ):
        pull(folder_url, tmp_path / "here")
    assert traffic.reads == {"index": 1, "piece": 1}


def test_a_folder_that_is_no_artifact_is_left_alone(folder_url, tiny_artifact, tmp_path):
    store_push.push(tiny_artifact, folder_url)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for folder in (tmp_path / "mine", tmp_path / "link"):
        with pytest.raises(PrecastError, match="is not an artifact, so --overwrite does not replace it"):
            pull(folder_url, folder, overwrite=True)
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]


# --- at the same time ---------------------------------------------------------------------------------------


def test_threads_that_pull_to_one_folder_fetch_once(url, tiny_artifact, tmp_path):
    pieces = store_push.push(tiny_artifact, url).pieces
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: pull(url, tmp_path / "here", overwrite=True), range(6)))
    assert sum(result.moved_pieces for result in results) == pieces
    assert same_folder(tiny_artifact, tmp_path / "here")


def test_processes_that_pull_to_one_folder(folder_url, tiny_artifact, tmp_path):
    """Two with one cache folder, two with their own, who do not wait for each other."""
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


def test_versions_pushed_at_the_same_time(url, tiny_artifact, tmp_path):
    versions = []
    for i in range(4):
        versions.append(Path(shutil.copytree(tiny_artifact, tmp_path / f"v{i}")))
        replace(versions[-1], "README.md", b"card %d" % i)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda root: store_push.push(root, url), versions))
    pull(url, tmp_path / "here")
    assert any(same_folder(tmp_path / "here", version) for version in versions)


# --- signatures ---------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path) -> SimpleNamespace:
    found = SimpleNamespace()
    for name in ("maker", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub.pem"
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        public.write_bytes(
            key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
        setattr(found, name, SimpleNamespace(private=private, public=public))
    return found


def test_a_signature_travels_along_and_is_checked_first(url, artifact_copy, tmp_path, traffic, keys):
    store_push.push(artifact_copy, url)
    with pytest.raises(PrecastError, match=r"expected a signature, found no manifest\.json\.sig"):
        pull(url, tmp_path / "here", key=keys.maker.public)
    assert traffic.reads == {"index": 1, "piece": 1}
    signing.sign(artifact_copy, keys.maker.private, str)
    assert store_push.push(artifact_copy, url).moved_pieces == 1
    traffic.reads.clear()
    with pytest.raises(PrecastError, match="it was made with another key"):
        pull(url, tmp_path / "here", key=keys.other.public)
    assert traffic.reads == {"index": 1, "piece": 1}
    assert pull(url, tmp_path / "here", key=keys.maker.public).signed
    assert same_folder(artifact_copy, tmp_path / "here")
    loading.read_manifest(tmp_path / "here", require_signature=keys.maker.public)


def test_a_signature_over_another_manifest_is_not_pushed(folder_url, artifact_copy, keys):
    signing.sign(artifact_copy, keys.maker.private, str)
    replace(artifact_copy, "README.md", b"another card")
    with pytest.raises(PrecastError, match=r"is not over this manifest\.json, which changed since; sign"):
        store_push.push(artifact_copy, folder_url)


def test_an_artifact_signed_later_is_not_fetched_again(url, artifact_copy, keys, traffic, tmp_path):
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


def put_signature(url: str, signature: bytes) -> None:
    """What whoever owns the store can do: give an artifact another signature."""
    path = Path(url.removeprefix("file://"))
    index, digest = in_index(url), hashlib.sha256(signature).hexdigest()
    (path.parent / "pieces" / digest[:2]).mkdir(exist_ok=True)
    (path.parent / "pieces" / digest[:2] / digest).write_bytes(signature)
    piece = {"bytes": len(signature), "sha256": digest}
    index["files"]["manifest.json.sig"] = piece | {"pieces": [piece]}
    path.with_suffix(".json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("by_other", "with_key", "text"),
    [
        (True, True, "it was made with another key"),
        (False, True, "is not the one that was signed"),
        (
            False,
            False,
            "manifest.json.sig is not over this manifest.json; have the artifact signed and pushed",
        ),
    ],
)
def test_a_signature_that_does_not_hold_replaces_none(
    folder_url, artifact_copy, keys, tmp_path, by_other, with_key, text
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
    assert said[0].endswith("Going on with what was pulled before.")
    for folder in (tmp_path / "here", tmp_path / "there"):
        with pytest.raises(PrecastError, match=text):
            pull(folder_url, folder, key=key)
    assert not (tmp_path / "there").exists()
    for folder in (here, tmp_path / "here"):
        assert (folder / "manifest.json.sig").read_bytes() == good
        loading.read_manifest(folder, require_signature=keys.maker.public)


def test_a_signature_that_cannot_be_written_is_no_reason_to_stop(
    folder_url, artifact_copy, keys, tmp_path, monkeypatch
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


# --- run from a URL -----------------------------------------------------------------------------------------


def test_run_from_a_url(cli, url, tiny_artifact, traffic):
    store_push.push(tiny_artifact, url)
    traffic.reads.clear()
    command = ("run", url, "--ids", "1,2,3", "-n", "4")
    first = cli(*command)
    assert first.exit_code == 0, first.output
    assert f"{url}: pulled 0.5 MB into " in first.stderr
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
    assert "it was made with another key" in refused.stderr
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
    assert "the store does not answer as it should (ConnectionError: no route to host)" in said[0]
    assert "Going on with what was pulled on 20" in said[0]
    with pytest.raises(PrecastError, match="the store does not answer as it should"):
        store_pull.fetch(url + "-other", require_signature=None, log=said.append)


def test_a_store_that_refuses_is_not_one_that_cannot_be_reached(url, tiny_artifact, traffic):
    store_push.push(tiny_artifact, url)
    store_pull.fetch(url, require_signature=None, log=lambda _: None)

    def fail(what, path):
        raise PermissionError("Access Denied \x1b[2J")

    traffic.fail = fail
    with pytest.raises(PrecastError, match=r"access was refused \(PermissionError: Access Denied \?\[2J\)"):
        store_pull.fetch(url, require_signature=None, log=lambda _: None)


def test_a_plain_web_server_is_a_store_to_pull_from(folder_url, tiny_artifact, tmp_path):
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
        # It sends whole files, whatever is asked for: still no more than that is taken.
        assert len(store_remote.open_store(url).read("tiny.json", 10)) == 11
        with pytest.raises(PrecastError, match="there is no artifact of this name"):
            pull(url + "-none", tmp_path / "there")
        with pytest.raises(PrecastError, match="this store can only be read; push to another"):
            store_push.push(tiny_artifact, url + "-new")
        kept = store_pull.fetch(url, require_signature=None, log=lambda _: None)
    finally:
        server.shutdown()
        server.server_close()
    # fsspec says "not found" of a server that is not there.
    said: list[str] = []
    assert store_pull.fetch(url, require_signature=None, log=said.append) == kept
    assert "cannot be reached" in said[0] or "does not answer" in said[0]


def test_an_artifact_that_was_taken_away_is_not_run_from_the_cache(folder_url, tiny_artifact, tmp_path):
    store_push.push(tiny_artifact, folder_url)
    store_pull.fetch(folder_url, require_signature=None, log=lambda _: None)
    (tmp_path / "store" / "tiny.json").unlink()
    with pytest.raises(PrecastError, match="there is no artifact of this name"):
        store_pull.fetch(folder_url, require_signature=None, log=lambda _: None)


def test_a_damaged_copy_in_the_cache_is_made_anew(folder_url, tiny_artifact):
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


def flip(path: Path) -> None:
    """Another byte, and no other size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["tokenizer.json", "weights.safetensors", "golden.json"])
def test_an_altered_file_in_the_cache_is_fetched_again(folder_url, tiny_artifact, traffic, name):
    store_push.push(tiny_artifact, folder_url)
    here = store_pull.fetch(folder_url, require_signature=None, log=lambda _: None)
    flip(here / name)
    traffic.reads.clear()
    assert store_pull.fetch(folder_url, require_signature=None, log=lambda _: None) == here
    assert traffic.reads == {"index": 1, "piece": 1}
    assert same_folder(here, tiny_artifact)


def test_an_altered_file_in_the_cache_that_cannot_be_fetched(folder_url, tiny_artifact, traffic):
    store_push.push(tiny_artifact, folder_url)
    here = store_pull.fetch(folder_url, require_signature=None, log=lambda _: None)
    flip(here / "tokenizer.json")

    def fail(what, path):
        raise ConnectionError("no route to host")

    traffic.fail = fail
    with pytest.raises(
        PrecastError, match=r"'tokenizer\.json' has sha256 .* remove that folder, and pull it again\."
    ):
        loading.load(folder_url)
    with pytest.raises(PrecastError, match=r"copy or export the artifact again\.$"):
        loading.load(here)


def test_a_cache_folder_that_cannot_be_written(folder_url, tiny_artifact, tmp_path, monkeypatch):
    store_push.push(tiny_artifact, folder_url)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PRECAST_CACHE", str(tmp_path / "file"))
    text = r"what arrives cannot be kept there \(Not a directory\); make room, or set PRECAST_CACHE"
    with pytest.raises(PrecastError, match=text):
        loading.load(folder_url)
    with pytest.raises(PrecastError, match=text):
        pull(folder_url, tmp_path / "here")


def test_a_file_system_without_locks(folder_url, tiny_artifact, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    store_push.push(tiny_artifact, folder_url)
    monkeypatch.setattr(fcntl, "flock", refuse)
    pull(folder_url, tmp_path / "here")
    here = store_pull.fetch(folder_url, require_signature=None, log=lambda _: None)
    assert same_folder(here, tiny_artifact)
    assert same_folder(tmp_path / "here", tiny_artifact)


def test_a_folder_that_somebody_fills_is_left_alone(folder_url, tiny_artifact):
    """By a process that does not see our lock; one that nobody fills any more is removed."""
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


# --- what is printed ----------------------------------------------------------------------------------------


def test_the_line_of_a_transfer_is_gone_when_it_fails(folder_url, tiny_artifact, tmp_path, traffic, terminal):
    store_push.push(tiny_artifact, folder_url)

    # Not after a number of pieces: threads fetch them, and which of their results is seen first is chance.
    def fail_once_shown(what, path):
        if "pulling: 0." in terminal.getvalue():
            raise PermissionError("the token has expired")

    traffic.fail = fail_once_shown
    with pytest.raises(PrecastError, match="access was refused"):
        pull(folder_url, tmp_path / "here")
    assert "pulling: 0." in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_messages_show_no_commands_to_a_terminal(capsys):
    for say in (loading._to_stderr, store_console._to_stderr):
        say("name \x1b]0;gone\x07\nsecond")
        assert (
            capsys.readouterr().err
            == "name \N{REPLACEMENT CHARACTER}]0;gone\N{REPLACEMENT CHARACTER} second\n"
        )


# --- URLs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("models/tiny", "expected a URL such as s3://bucket/models/NAME"),
        ("s3://bucket", "expected a folder and a name of letters, digits"),
        ("file:///", "expected a folder and a name"),
        ("s3://bucket/a/..", "expected a folder and a name of letters, digits"),
        ("s3://bucket/pieces", "expected a folder and a name of letters, digits"),
        ("https://host/tiny?token=topsecret", "expected a plain URL, without a query and of one protocol"),
        ("simplecache::s3://bucket/tiny", "expected a plain URL"),
        ("nosuch://bucket/tiny", "this URL cannot be opened (Protocol not known: nosuch); check it"),
        (
            "sftp://host/models/tiny",
            "sftp:// is no store that precast knows; mount the folder and give it as file",
        ),
        ("gs://bucket/tiny", "gs:// needs a package that is not installed: pip install gcsfs"),
    ],
)
def test_what_is_no_url_of_a_store(cli, tiny_artifact, url, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for command in (("push", tiny_artifact, url), ("pull", url)):
        result = cli(*command)
        assert result.exit_code == 2
        assert text in result.stderr
        assert "topsecret" not in result.output


def test_without_fsspec(tiny_artifact, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(PrecastError, match=r"pip install 'precast\[store\]'"):
        store_push.push(tiny_artifact, "s3://bucket/tiny")


def test_secrets_in_a_url_are_told_to_nobody(cli, s3_server, tiny_artifact, tmp_path, own_cache):
    url = f"s3://AKIAEXAMPLE:top%2Fsecret@{BUCKET}/{tmp_path.name}/tiny"
    results = [
        cli("push", tiny_artifact, url),
        cli("pull", url, "-o", tmp_path / "here"),
        cli("run", url, "--ids", "1,2", "-n", "2"),
        cli("pull", url + "-none", "-o", tmp_path / "there"),
        cli("push", tiny_artifact, f"s3://AKIAEXAMPLE:top%2Fsecret@no-such-bucket/{tmp_path.name}/tiny"),
        cli("push", tiny_artifact, "sftp://me:top%2Fsecret@127.0.0.1:9/x/tiny"),
        cli("pull", "https://me:top%2Fsecret@127.0.0.1:9/x/tiny"),
    ]
    assert [result.exit_code for result in results] == [0, 0, 0, 2, 2, 2, 2]
    kept = b"".join(p.read_bytes() for p in own_cache.rglob("*") if p.is_file())
    for text in (*(result.output for result in results), kept.decode("latin-1")):
        assert "top%2Fsecret" not in text
        assert "top/secret" not in text
        assert "AKIAEXAMPLE" not in text
    assert f"s3://***@{BUCKET}/{tmp_path.name}/tiny" in results[0].stdout


def test_what_a_library_says_is_shown_without_secrets():
    url = "s3://key:sec/ret@bucket/models/tiny"
    text = "GET https://key:sec%2Fret@host/bucket?X-Amz-Signature=abc failed for key:sec/ret@bucket"
    shown = store_remote._hide(text, url)
    assert "sec" not in shown.replace("***", "")
    assert "abc" not in shown
    assert store_remote.without_secrets(url) == "s3://***@bucket/models/tiny"
    assert store_remote.without_secrets("file:///home/me@work/tiny") == "file:///home/me@work/tiny"


def test_the_manifest_of_a_pulled_artifact_is_understood(folder_url, tiny_artifact, tmp_path, cli):
    """The commands, as the documentation shows them."""
    pushed = cli("push", tiny_artifact, folder_url, "--json")
    assert json.loads(pushed.stdout)["manifest"] == in_index(folder_url)["manifest"]
    pulled = cli("pull", folder_url, "-o", tmp_path / "here")
    assert "fetched 1" in pulled.stdout
    assert "MB; not signed" in pulled.stdout
    parse_manifest((tmp_path / "here" / "manifest.json").read_bytes(), "here")
