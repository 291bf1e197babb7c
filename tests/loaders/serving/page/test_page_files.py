"""The files of the chat page: headers, caching, HEAD, and their place in the package."""

import re
from typing import Any

import pytest

from precast.loaders.serving import page


def test_every_file_of_the_folder_is_served() -> None:
    files = {path.name for path in page.FOLDER.iterdir()}
    assert sorted(page.FILES.values()) == sorted(files)


@pytest.mark.parametrize("path", page.FILES)
def test_files_have_a_type_and_strict_headers(tiny_server: Any, path: str) -> None:
    status, headers, text = tiny_server.request(path)
    assert status == 200
    assert text == (page.FOLDER / page.FILES[path]).read_text()
    kinds = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    assert headers["content-type"].partition(";")[0] == kinds[page.FILES[path].rpartition(".")[2]]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["trusted-types"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"


def test_a_known_file_is_not_sent_again(tiny_server: Any) -> None:
    _, headers, text = tiny_server.request("/")
    assert headers["cache-control"] == "no-cache"
    for known in (headers["etag"], f'"other", W/{headers["etag"]}', "*"):
        status, again, body = tiny_server.request("/", headers={"if-none-match": known})
        assert (status, again["etag"], body) == (304, headers["etag"], "")
    status, _, body = tiny_server.request("/", headers={"if-none-match": '"other"'})
    assert (status, body) == (200, text)


def test_head_tells_the_length(tiny_server: Any) -> None:
    status, headers, text = tiny_server.request("/", method="HEAD")
    assert (status, text) == (200, "")
    assert int(headers["content-length"]) == (page.FOLDER / "index.html").stat().st_size


def test_other_methods_and_files_are_errors(tiny_server: Any) -> None:
    status, headers, body = tiny_server.request("/", {})
    assert (status, headers["allow"], body["error"]["code"]) == (405, "GET, HEAD", "method_not_allowed")
    assert tiny_server.request("/page/../page.py")[0] == 404
    assert tiny_server.request("/page/other.js")[0] == 404


def test_files_name_no_other_server() -> None:
    for path in page.FOLDER.iterdir():
        addresses = re.findall(r"https?://[\w.]+", path.read_text())
        assert set(addresses) <= {"http://www.w3.org"}, path.name


def test_files_are_short_and_never_make_html_of_text() -> None:
    for path in page.FOLDER.iterdir():
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), (
            path.name
        )
