"""The chat page at ``/``: static files, which browsers keep until their content changes."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from .answers import Services
from .requests import Reply, Request

FOLDER = Path(__file__).parent / "static"
MODULES = (
    "answering.js",
    "api.js",
    "app.js",
    "dom.js",
    "markdown.js",
    "messages.js",
    "settings.js",
    "spans.js",
    "store.js",
)
# The file of each path.
FILES: Mapping[str, str] = {
    "/": "index.html",
    **{f"/page/{name}": name for name in ("icon.svg", "style.css", *MODULES)},
}
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# The page loads its own files only, talks to its own server only, and never turns text into HTML.
_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
)
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "; ".join(_POLICY),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


async def show(services: Services, request: Request, body: bytes, *, name: str) -> Reply:
    """Show a file of the page; the reply has no body if the client already has the file."""
    path = FOLDER / name
    data = await services.prepare(request, path.read_bytes)
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {**_HEADERS, "etag": tag, "content-length": str(len(data))}
    is_known = _matches(request.headers.get("if-none-match", ""), tag)
    return Reply(
        body=b"" if is_known else data,
        status=304 if is_known else 200,
        media_type=_TYPES[path.suffix],
        headers=headers,
    )


def _matches(known: str, tag: str) -> bool:
    """Return True if a header If-None-Match names a tag."""
    tags = (one.strip().removeprefix("W/") for one in known.split(","))
    return known.strip() == "*" or tag in tags
