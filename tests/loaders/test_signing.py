"""Signatures: signed artifacts load, and each kind of invalid signature has its own error message."""

import base64
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from precast.loaders import load as loading
from precast.loaders import signing
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.compiling import trial

SIGNATURE = "manifest.json.sig"


def write_keys(folder: Path, name: str, key, password: bytes | None = None) -> tuple[Path, Path]:
    """Write a key pair; return the files of the private and the public key."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    protection = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, protection)
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """Return a folder with a key pair of every kind, by name."""
    folder = tmp_path_factory.mktemp("keys")
    write_keys(folder, "maker", ec.generate_private_key(ec.SECP256R1()))
    write_keys(folder, "other", ec.generate_private_key(ec.SECP256R1()))
    write_keys(folder, "p384", ec.generate_private_key(ec.SECP384R1()))
    write_keys(folder, "p521", ec.generate_private_key(ec.SECP521R1()))
    write_keys(folder, "k256", ec.generate_private_key(ec.SECP256K1()))
    write_keys(folder, "rsa", rsa.generate_private_key(65537, 2048))
    write_keys(folder, "locked", ec.generate_private_key(ec.SECP256R1()), b"open sesame")
    (folder / "text.pem").write_text("no key at all")
    return folder


def no_password() -> str:
    raise AssertionError("no password is needed")


@pytest.fixture
def signed(artifact_copy, keys) -> Path:
    signing.sign(artifact_copy, keys / "maker.pem", no_password)
    return artifact_copy


def refusal(root: Path, key: Path) -> str:
    with pytest.raises(PrecastError) as caught:
        loading.load(root, require_signature=key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- valid --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["maker", "p384", "p521"])
def test_a_signed_artifact_is_accepted_with_the_makers_key(artifact_copy, keys, name):
    fingerprint = signing.sign(artifact_copy, keys / f"{name}.pem", no_password)
    assert len(fingerprint) == 64
    loading.read_manifest(artifact_copy, require_signature=keys / f"{name}.pub.pem")
    bundle = json.loads((artifact_copy / SIGNATURE).read_text())
    assert bundle["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    mode = (artifact_copy / SIGNATURE).stat().st_mode
    assert mode == (artifact_copy / "manifest.json").stat().st_mode


def test_a_signed_artifact_is_loaded_without_a_trial(signed, keys, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a signed artifact was tried")

    monkeypatch.setattr(trial, "ensure", fail)
    model = loading.load(signed, require_signature=keys / "maker.pub.pem")
    assert model.manifest.name == "tiny"
    with pytest.raises(AssertionError, match="was tried"):
        loading.load(signed)


def test_signing_and_running_from_the_command_line(cli, artifact_copy, keys):
    done = cli("sign", artifact_copy, "--key", keys / "maker.pem")
    assert done.exit_code == 0, done.output
    assert f"signed {artifact_copy} with the key of sha256 " in done.stdout
    command = ("run", artifact_copy, "--ids", "1,2,3", "-n", "4", "--require-signature")
    assert cli(*command, keys / "maker.pub.pem").exit_code == 0
    refused = cli(*command, keys / "other.pub.pem")
    assert refused.exit_code == 2
    assert "made with another key" in refused.stderr


def test_verify_requires_a_signature_too(cli, signed, keys):
    assert cli("verify", signed, "--require-signature", keys / "maker.pub.pem").exit_code == 0
    refused = cli("verify", signed, "--require-signature", keys / "other.pub.pem")
    assert refused.exit_code == 2
    assert "made with another key" in refused.stderr


def test_model_signing_s_own_command_verifies_and_creates_the_same_signatures(signed, keys):
    def command(*arguments) -> int:
        line = [sys.executable, "-m", "model_signing", *map(str, arguments), str(signed / "manifest.json")]
        return subprocess.run(line, capture_output=True, check=False).returncode

    verify = ("verify", "key", "--signature", signed / SIGNATURE, "--public_key")
    assert command(*verify, keys / "maker.pub.pem") == 0
    assert command(*verify, keys / "other.pub.pem") != 0
    assert command("sign", "key", "--signature", signed / SIGNATURE, "--private_key", keys / "other.pem") == 0
    loading.read_manifest(signed, require_signature=keys / "other.pub.pem")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_the_documentation_s_commands_for_keys(artifact_copy, tmp_path):
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    make = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private]
    subprocess.run(make, check=True, capture_output=True)
    subprocess.run(
        ["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, capture_output=True
    )
    locked = tmp_path / "locked.pem"
    lock = ["openssl", "ec", "-in", private, "-aes256", "-passout", "pass:open sesame", "-out", locked]
    subprocess.run(lock, check=True, capture_output=True)
    signing.sign(artifact_copy, locked, lambda: "open sesame")
    loading.read_manifest(artifact_copy, require_signature=public)


# --- invalid ------------------------------------------------------------------------------------------------


def test_no_signature(artifact_copy, keys):
    text = refusal(artifact_copy, keys / "maker.pub.pem")
    assert (
        "expected a signature, found no manifest.json.sig; ask for a copy that its maker has signed" in text
    )


def test_another_key(signed, keys):
    text = refusal(signed, keys / "other.pub.pem")
    assert "made with another key (sha256 " in text
    assert re.search(r"for the public key [0-9a-f]{12}…, or for a copy signed with the expected key\.$", text)


def test_an_altered_manifest(signed, keys):
    (signed / "manifest.json").write_bytes((signed / "manifest.json").read_bytes() + b"\n")
    assert "manifest.json is not the one that was signed" in refusal(signed, keys / "maker.pub.pem")


def test_the_signature_is_verified_before_the_manifest_is_parsed(signed, keys):
    (signed / "manifest.json").write_text("no JSON at all")
    assert "is not the one that was signed" in refusal(signed, keys / "maker.pub.pem")


def test_the_signature_of_another_artifact(signed, keys, slots_artifact, tmp_path):
    other = Path(shutil.copytree(slots_artifact, tmp_path / "other"))
    shutil.copy(signed / SIGNATURE, other / SIGNATURE)
    assert "or the signature belongs to another artifact" in refusal(other, keys / "maker.pub.pem")


def forge(root: Path, change) -> None:
    """Apply a function to the statement inside a signature."""
    bundle = json.loads((root / SIGNATURE).read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (root / SIGNATURE).write_text(json.dumps(bundle))


def test_a_forged_statement(signed, keys):
    from hashlib import sha256

    (signed / "manifest.json").write_bytes((signed / "manifest.json").read_bytes() + b"\n")
    digest = sha256((signed / "manifest.json").read_bytes())

    def fit(statement):
        statement["predicate"]["resources"][0]["digest"] = digest.hexdigest()
        statement["subject"][0]["digest"]["sha256"] = sha256(digest.digest()).hexdigest()

    forge(signed, fit)
    assert "the signature is invalid, so it was altered" in refusal(signed, keys / "maker.pub.pem")


def test_a_key_inside_the_signature_is_ignored(signed, keys, artifact_copy):
    mine = json.loads((signed / SIGNATURE).read_text())
    hint = mine["verificationMaterial"]["publicKey"]["hint"]
    signing.sign(artifact_copy, keys / "other.pem", no_password)
    other = json.loads((artifact_copy / SIGNATURE).read_text())
    other["verificationMaterial"]["publicKey"]["hint"] = hint
    (artifact_copy / SIGNATURE).write_text(json.dumps(other))
    assert "the signature is invalid" in refusal(artifact_copy, keys / "maker.pub.pem")


def test_damage_anywhere_in_signature_or_statement(signed, keys):
    whole = json.loads((signed / SIGNATURE).read_text())
    envelope = whole["dsseEnvelope"]
    for place, text in (("payload", envelope["payload"]), ("sig", envelope["signatures"][0]["sig"])):
        for at in range(0, len(text) - 4, max(1, len(text) // 12)):
            damaged = text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]
            if place == "payload":
                envelope["payload"] = damaged
            else:
                envelope["signatures"][0]["sig"] = damaged
            (signed / SIGNATURE).write_text(json.dumps(whole))
            with pytest.raises(PrecastError):
                loading.read_manifest(signed, require_signature=keys / "maker.pub.pem")
        envelope["payload" if place == "payload" else "signatures"] = (
            text if place == "payload" else [{"sig": text, "keyid": ""}]
        )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '{"verificationMaterial": {"publicKey": {"hint": "\\u001b[31m"}}, "dsseEnvelope": {"payload": "e30="}}',
        '{"verificationMaterial": {"publicKey": {}}, "dsseEnvelope": {"payload": "e30="}}',
        '{"verificationMaterial": null, "dsseEnvelope": []}',
        "é" * 10,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_files_that_are_not_signatures(artifact_copy, keys, text):
    (artifact_copy / SIGNATURE).write_text(text)
    message = refusal(artifact_copy, keys / "maker.pub.pem")
    assert SIGNATURE in message
    assert "expected" in message or "nested too deeply" in message
    assert "\x1b" not in message


def test_a_huge_signature_or_a_symlink(signed, keys, tmp_path):
    (signed / SIGNATURE).rename(tmp_path / "elsewhere.sig")
    (signed / SIGNATURE).symlink_to(tmp_path / "elsewhere.sig")
    assert "to be a plain file inside the artifact" in refusal(signed, keys / "maker.pub.pem")
    (signed / SIGNATURE).unlink()
    (signed / SIGNATURE).write_bytes(b" " * (signing.MAX_SIGNATURE_BYTES + 1))
    assert "expected at most 1048576 bytes" in refusal(signed, keys / "maker.pub.pem")


def test_a_statement_about_a_folder_is_not_a_signature_of_a_manifest(artifact_copy, keys, tmp_path):
    """The same key may have signed something else, such as an empty folder."""
    from model_signing import signing as library

    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", artifact_copy):
        config = library.Config().use_elliptic_key_signer(private_key=keys / "maker.pem")
        config.sign(folder, tmp_path / "folder.sig")
        shutil.copy(tmp_path / "folder.sig", artifact_copy / SIGNATURE)
        assert "expected a signature of OpenSSF model signing" in refusal(
            artifact_copy, keys / "maker.pub.pem"
        )


def test_the_verified_bytes_are_parsed(signed, keys, monkeypatch):
    """A manifest that is replaced right after the verification has no effect."""
    check = signing.check_signature

    def check_and_exchange(root, manifest, key):
        check(root, manifest, key)
        (root / "manifest.json").write_text("{}")

    monkeypatch.setattr(signing, "check_signature", check_and_exchange)
    manifest = loading.read_manifest(signed, require_signature=keys / "maker.pub.pem")
    assert manifest.name == "tiny"


def test_an_altered_file_is_refused_although_the_signature_is_valid(signed, keys):
    (signed / "tokenizer.json").write_bytes((signed / "tokenizer.json").read_bytes()[:-1] + b" ")
    assert "it has been altered: copy or export the artifact again" in refusal(signed, keys / "maker.pub.pem")


# --- keys and signed artifacts -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none.pem", "the key cannot be read (No such file or directory)"),
        ("text.pem", "expected a public key in PEM, found something else; write one with: openssl ec -in"),
        ("maker.pem", "expected a public key, found a private key; write its public key with"),
        ("rsa.pub.pem", "expected an elliptic curve key of P-256, P-384 or P-521, found RSAPublicKey"),
        ("k256.pub.pem", "found secp256k1"),
    ],
)
def test_files_that_are_not_public_keys(signed, keys, name, text):
    assert text in refusal(signed, keys / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none.pem", "the key cannot be read (No such file or directory)"),
        ("text.pem", "expected a private key in PEM, found something else; make one with: openssl ecparam"),
        ("maker.pub.pem", "expected a private key in PEM, found a public key"),
        ("rsa.pem", "found RSAPrivateKey"),
        ("k256.pem", "found secp256k1"),
    ],
)
def test_files_that_are_not_private_keys(artifact_copy, keys, name, text):
    with pytest.raises(PrecastError) as caught:
        signing.sign(artifact_copy, keys / name, no_password)
    assert text in str(caught.value)
    assert not (artifact_copy / SIGNATURE).exists()


def test_a_password(cli, artifact_copy, keys, monkeypatch):
    refused = cli("sign", artifact_copy, "--key", keys / "locked.pem", stdin="wrong\n")
    assert refused.exit_code == 2
    assert refused.stderr.endswith(
        f"{keys / 'locked.pem'}: this password does not open the private key; try another.\n"
    )
    monkeypatch.setenv("PRECAST_KEY_PASSWORD", "open sesame")
    assert cli("sign", artifact_copy, "--key", keys / "locked.pem").exit_code == 0
    loading.read_manifest(artifact_copy, require_signature=keys / "locked.pub.pem")


def test_a_damaged_artifact_is_not_signed(artifact_copy, keys):
    (artifact_copy / "README.md").write_text("another card")
    with pytest.raises(PrecastError, match=r"README\.md"):
        signing.sign(artifact_copy, keys / "maker.pem", no_password)
    assert not (artifact_copy / SIGNATURE).exists()


def test_without_the_library(signed, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    assert "which is not installed: pip install 'precast[sign]'" in refusal(signed, keys / "maker.pub.pem")
    with pytest.raises(PrecastError, match=r"pip install 'precast\[sign\]'"):
        signing.sign(signed, keys / "maker.pem", no_password)
