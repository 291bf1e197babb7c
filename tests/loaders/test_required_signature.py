"""A required key applies everywhere, and unverified artifacts never replace verified ones."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import precast
from precast.cli import main
from precast.loaders import load as loading
from precast.loaders import required_key as required
from precast.loaders import signing
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.store import pull as store_pull
from precast.loaders.store import push as store_push

MANIFEST, SIGNATURE = "manifest.json", "manifest.json.sig"
VARIABLE = "PRECAST_REQUIRE_SIGNATURE"
# Commands that require a signature, with their other arguments. A is the artifact, and B is another, signed artifact.
REQUIRING = {
    "run": ("A", "--ids", "1,2,3", "-n", "2"),
    "chat": ("A",),
    "batch": ("A", "requests.jsonl", "answers.jsonl"),
    "add-target": ("A",),
    "add-prefix": ("A", "greeting", "--text", __file__),
    "remove-prefix": ("A", "greeting"),
    "inspect": ("A",),
    "check": ("A",),
    "verify": ("A",),
    "diff": ("B", "A"),
    "eval": ("A",),
    "pull": ("file://A",),
}
MORE = [("diff", ("A", "B")), ("eval", ("B", "--reference", "A"))]
# The other commands, and the reasons why they need no signature.
EXEMPT = {
    "export": "makes an artifact, which nobody can have signed",
    "sign": "makes the signature, of files that it hashes",
    "push": "sends bytes on; whoever pulls them checks",
    "serve": "runs until it is stopped; the tests of its pool require signatures",
    "list": "shows names, and says nothing of what is in the artifacts",
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> SimpleNamespace:
    """Make the key pairs of two makers; return the files of the private and the public keys."""
    folder, found = tmp_path_factory.mktemp("keys"), SimpleNamespace()
    pem, text = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    for name in "ab":
        key = ec.generate_private_key(ec.SECP256R1())
        private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
        private.write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        public.write_bytes(key.public_key().public_bytes(pem, text))
        setattr(found, name, SimpleNamespace(private=private, public=public))
    return found


@pytest.fixture(autouse=True)
def no_requirement_of_this_machine(monkeypatch, tmp_path, own_cache):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(required, "SYSTEM_KEY", tmp_path / "etc" / "key.pem")


# --- commands -----------------------------------------------------------------------------------------------


def test_every_command_requires_a_signature_or_is_listed_with_a_reason():
    assert set(main.commands) <= set(REQUIRING) | set(EXEMPT)
    for name in set(main.commands) & set(REQUIRING):
        assert "require_signature" in {p.name for p in main.commands[name].params}, name
    for name in set(main.commands) & set(EXEMPT):
        assert isinstance(main.commands[name], click.Command)


@pytest.fixture
def unsigned_and_signed(artifact_copy, keys, tmp_path) -> tuple[Path, Path]:
    signed = Path(shutil.copytree(artifact_copy, tmp_path / "signed"))
    signing.sign(signed, keys.a.private, str)
    return artifact_copy, signed


@pytest.mark.parametrize(("command", "arguments"), [*REQUIRING.items(), *MORE])
@pytest.mark.parametrize("how", ["option", "environment", "machine"])
def test_an_artifact_that_is_not_signed_is_refused(
    cli, unsigned_and_signed, keys, monkeypatch, tmp_path, command, arguments, how
):
    artifact, signed = unsigned_and_signed
    if command == "pull":
        store_push.push(artifact, f"file://{tmp_path}/store/tiny")
        arguments = (f"file://{tmp_path}/store/tiny", "-o", tmp_path / "here")
    named = [{"A": artifact, "B": signed}.get(argument, argument) for argument in arguments]
    option = ["--require-signature", keys.a.public] if how == "option" else []
    if how == "environment":
        monkeypatch.setenv(VARIABLE, str(keys.a.public))
    elif how == "machine":
        required.SYSTEM_KEY.parent.mkdir()
        shutil.copy(keys.a.public, required.SYSTEM_KEY)
    result = cli(command, *named, *option)
    assert result.exit_code == 2, result.output
    assert f"expected a signature, found no {SIGNATURE}" in result.stderr
    assert result.stdout == ""


def test_signed_artifacts_pass(cli, unsigned_and_signed, keys, monkeypatch):
    _, signed = unsigned_and_signed
    monkeypatch.setenv(VARIABLE, str(keys.a.public))
    for command in ("inspect", "check", "run"):
        assert cli(command, signed, *REQUIRING[command][1:]).exit_code == 0
    assert f"signature valid, by the key {keys.a.public}" in cli("check", signed).stdout
    assert json.loads(cli("check", signed, "--json").stdout)["signature_checked"]
    monkeypatch.delenv(VARIABLE)
    assert "signature present, not checked" in cli("check", signed).stdout
    assert not json.loads(cli("check", signed, "--json").stdout)["signature_checked"]


# --- the setting --------------------------------------------------------------------------------------------


def test_load_uses_the_environment_s_key_and_a_given_key(unsigned_and_signed, keys, monkeypatch):
    unsigned, signed = unsigned_and_signed
    monkeypatch.setenv(VARIABLE, str(keys.b.public))
    for artifact, text in ((unsigned, "expected a signature, found no"), (signed, "made with another key")):
        for options in ({}, {"require_signature": None}, {"trusted": True}):
            with pytest.raises(PrecastError, match=text):
                precast.load(artifact, **options)
    assert precast.load(signed, require_signature=keys.a.public).manifest.name == "tiny"
    monkeypatch.setenv(VARIABLE, "")
    assert precast.load(unsigned).manifest.name == "tiny"


def test_the_order_of_required_keys(monkeypatch, tmp_path):
    assert required.required_key(None) is None
    required.SYSTEM_KEY.parent.mkdir()
    required.SYSTEM_KEY.symlink_to("nothing")
    assert required.required_key(None) == required.SYSTEM_KEY
    monkeypatch.setenv(VARIABLE, "~/key.pem")
    assert required.required_key(None) == Path.home() / "key.pem"
    assert required.required_key("own.pem") == Path("own.pem")


def test_a_missing_key_file_does_not_lift_the_requirement(unsigned_and_signed, monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gone.pem"))
    for artifact in unsigned_and_signed:
        with pytest.raises(PrecastError, match=r"gone\.pem: the key cannot be read"):
            precast.load(artifact)


def test_an_export_loads_its_own_unsigned_artifact(export_tiny, keys, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(keys.a.public))
    made = export_tiny(targets=("cpu", "portable"))
    with pytest.raises(PrecastError, match="expected a signature, found no"):
        precast.load(made)


# --- stores -------------------------------------------------------------------------------------------------


@pytest.fixture
def url(tmp_path) -> str:
    return f"file://{tmp_path}/store/tiny"


@pytest.fixture
def versions(artifact_copy, keys, tmp_path):
    """Return a function that pushes a version to the store: signed by a, by b, or unsigned, each with another card."""
    made = {}
    for name in ("a", "b", "none"):
        root = made[name] = Path(shutil.copytree(artifact_copy, tmp_path / f"version-{name}"))
        (root / "README.md").write_text(f"card of {name}")
        manifest = json.loads((root / MANIFEST).read_text())
        data = (root / "README.md").read_bytes()
        manifest["files"]["README.md"] = {"bytes": len(data), "sha256": _sha256(data)}
        (root / MANIFEST).write_text(json.dumps(manifest))
        if name != "none":
            signing.sign(root, getattr(keys, name).private, str)
    return lambda name, url: store_push.push(made[name], url)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def fetch(url: str, key: Path | None, said: list[str] | None = None) -> Path:
    return store_pull.fetch(url, require_signature=key, log=(said if said is not None else []).append)


def unreachable(monkeypatch) -> None:
    def fail(*_, **__):
        raise store_pull.UnreachableError("the store does not answer.")

    monkeypatch.setattr(store_pull, "_read_index", fail)


@pytest.mark.parametrize("then", ["b", "none"])
def test_an_artifact_verified_with_a_key_stays_when_the_url_changes_for_others(
    versions, url, keys, monkeypatch, then
):
    """Pull with key a. Then the store changes, and another run uses key b or no key."""
    versions("a", url)
    checked = fetch(url, keys.a.public)
    before = contents(checked)
    versions(then, url)
    other = fetch(url, None if then == "none" else keys.b.public)
    assert other != checked
    assert (other / "README.md").read_text() == f"card of {then}"
    assert contents(checked) == before
    with pytest.raises(PrecastError, match=r"expected a signature|made with another key"):
        fetch(url, keys.a.public)
    # Without the store, runs with each key and runs without a key use their own last artifact.
    unreachable(monkeypatch)
    assert fetch(url, keys.a.public) == checked
    assert fetch(url, None if then == "none" else keys.b.public) == other
    loading.read_manifest(checked, require_signature=keys.a.public)


def test_a_pull_without_a_key_and_then_with_one(versions, url, keys, monkeypatch):
    versions("none", url)
    unchecked = fetch(url, None)
    with pytest.raises(PrecastError, match="expected a signature"):
        fetch(url, keys.a.public)
    versions("a", url)
    checked = fetch(url, keys.a.public)
    assert checked != unchecked
    unreachable(monkeypatch)
    assert (fetch(url, None), fetch(url, keys.a.public)) == (unchecked, checked)
    with pytest.raises(PrecastError, match="does not answer"):
        fetch(url, keys.b.public)


def test_another_signature_of_the_same_artifact_does_not_replace_the_first(versions, url, keys, tmp_path):
    """The store serves the same artifact with a signature by another maker; a pull without a key accepts it."""
    versions("a", url)
    checked = fetch(url, keys.a.public)
    store_pull.pull(url, tmp_path / "here", overwrite=False, require_signature=keys.a.public, log=print)
    resigned = Path(shutil.copytree(tmp_path / "version-a", tmp_path / "resigned"))
    signing.sign(resigned, keys.b.private, str)
    store_push.push(resigned, url)
    fetch(url, None)
    store_pull.pull(url, tmp_path / "here", overwrite=True, require_signature=None, log=print)
    for root in (checked, tmp_path / "here"):
        loading.read_manifest(root, require_signature=keys.a.public)


def test_a_pull_without_a_key_does_not_replace_a_verified_folder(versions, url, keys, tmp_path):
    here = tmp_path / "here"

    def pull(key: Path | None, *, overwrite: bool = True) -> str:
        store_pull.pull(url, here, overwrite=overwrite, require_signature=key, log=print)
        return (here / "README.md").read_text()

    versions("a", url)
    pull(keys.a.public)
    before = contents(here)
    for other in ("none", "b"):
        versions(other, url)
        with pytest.raises(PrecastError) as caught:
            pull(None)
        assert str(caught.value).startswith(f"{here}: the artifact here was verified with a key (sha256 ")
        assert str(caught.value).endswith("name a key with --require-signature, or another folder with -o.")
        assert contents(here) == before
    assert pull(keys.b.public) == "card of b"
    versions("none", url)
    with pytest.raises(PrecastError, match="the artifact here was verified with a key"):
        pull(None)
    # Files that were added after the pull are unverified.
    shutil.rmtree(here)
    shutil.copytree(tmp_path / "version-a", here)
    assert pull(None) == "card of none"
    assert pull(None) == "card of none"


def test_a_signature_is_removed_by_add_target_and_must_be_made_again(cli, unsigned_and_signed, keys):
    """Test only the refusal; `test_add_target` covers the removal."""
    _, signed = unsigned_and_signed
    before = contents(signed)
    result = cli("add-target", signed, "--require-signature", keys.b.public)
    assert result.exit_code == 2
    assert "made with another key" in result.stderr
    assert contents(signed) == before
