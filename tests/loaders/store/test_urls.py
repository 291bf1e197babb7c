"""URLs of stores: refused URLs, and the secrets in URLs."""

import sys

import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.store import push as store_push
from precast.loaders.store import remote as store_remote

BUCKET = "models"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("models/tiny", "expected a URL such as s3://bucket/models/NAME"),
        ("s3://bucket", "expected a folder and a name of letters, digits"),
        ("file:///", "expected a folder and a name"),
        ("s3://bucket/a/..", "expected a folder and a name of letters, digits"),
        ("s3://bucket/pieces", "expected a folder and a name of letters, digits"),
        ("https://host/tiny?token=topsecret", "expected a plain URL, with one protocol and without a query"),
        ("simplecache::s3://bucket/tiny", "expected a plain URL"),
        ("nosuch://bucket/tiny", "the URL cannot be opened (Protocol not known: nosuch); check the URL"),
        (
            "sftp://host/models/tiny",
            "precast does not support sftp://; mount the folder and give it as file",
        ),
        ("gs://bucket/tiny", "gs:// needs a package that is not installed: pip install gcsfs"),
    ],
)
def test_unsuitable_urls_are_refused(cli, tiny_artifact, url, text, monkeypatch):
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


def test_secrets_in_a_url_never_appear(cli, s3_server, tiny_artifact, tmp_path, own_cache):
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


def test_messages_of_libraries_are_shown_without_secrets():
    url = "s3://key:sec/ret@bucket/models/tiny"
    text = "GET https://key:sec%2Fret@host/bucket?X-Amz-Signature=abc failed for key:sec/ret@bucket"
    shown = store_remote._hide(text, url)
    assert "sec" not in shown.replace("***", "")
    assert "abc" not in shown
    assert store_remote.without_secrets(url) == "s3://***@bucket/models/tiny"
    assert store_remote.without_secrets("file:///home/me@work/tiny") == "file:///home/me@work/tiny"
