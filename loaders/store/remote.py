"""Remote stores. A store is a folder with a URL, in any file system that fsspec supports.

Secrets in a URL (``s3://KEY:SECRET@bucket/…``) appear neither in messages nor on disk.
"""

import errno
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import random
from secrets import token_hex
from typing import Any, TypeVar
from urllib.parse import unquote

from ..artifact.errors import PrecastError
from ..artifact.files import open_plain
from ..artifact.interrupt import on_interrupt

Result = TypeVar("Result")

# Seconds between attempts, each multiplied by a random factor from 0.5 to 1.5.
_WAITS = (0.5, 1.0, 2.0)
# Errors that a retry cannot change.
_PERMANENT = (
    FileExistsError,
    ImportError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    PermissionError,
)
_PERMANENT_CODES = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM}
# The HTTP status codes with which a web server refuses PUT.
_READ_ONLY = (405, 501)
# For these protocols, fsspec always caches listings, and partly written files are visible.
_UNSUPPORTED = ("sftp", "ssh")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

_NOT_FOUND = 404


class NotFoundError(PrecastError):
    """The store does not have the file."""


class UnreachableError(PrecastError):
    """The store does not answer, or answers with a transient error."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """An open store, and the name of one artifact in it.

    Attributes:
        files: fsspec's file system.
        folder: the store's folder in that file system, with a final slash.
        name: the artifact's name.
        url: the artifact's URL, which may contain secrets.
    """

    files: Any
    folder: str
    name: str
    url: str

    def __str__(self) -> str:
        return without_secrets(self.url)

    def read(self, path: str, limit: int, *, attempts: int = len(_WAITS) + 1) -> bytes:
        """Return the first `limit` + 1 bytes of a file. If there are that many, the file exceeds the limit.

        Args:
            path: the file's path in the store.
            limit: the largest size in bytes that the caller accepts.
            attempts: number of attempts after which the store counts as unreachable.

        Raises:
            NotFoundError: the file does not exist.
            UnreachableError: the store does not answer.
            PrecastError: the store refuses access.
        """
        return self._with_retries(lambda: self._read(self.folder + path, limit), path, attempts)

    def size(self, path: str) -> int | None:
        """Return the size of a file in bytes; None if the file does not exist."""
        try:
            size: int = self._with_retries(lambda: self.files.info(self.folder + path)["size"], path)
        except NotFoundError:
            return None
        return size

    def write(self, path: str, data: bytes) -> None:
        """Write a file atomically. An existing file is replaced.

        Raises:
            PrecastError: the store refuses the file.
        """
        try:
            self._with_retries(lambda: self._write(self.folder + path, data), path)
        except NotFoundError:
            raise PrecastError(
                f"{self}: this bucket or folder does not exist; create it, or check the URL."
            ) from None

    def _read(self, path: str, limit: int) -> bytes:
        if "file" in self.files.protocol:
            return _read_plain(Path(path), limit)
        if "http" not in self.files.protocol:
            data: bytes = self.files.cat_file(path, start=0, end=limit + 1)
            return data
        # A web server may ignore the requested range and send the whole file.
        with self.files.open(path, "rb", block_size=0) as file:
            blocks, left = [], limit + 1
            while left and (block := file.read(left)):
                blocks.append(block)
                left -= len(block)
            return b"".join(blocks)

    def _write(self, path: str, data: bytes) -> None:
        if "file" not in self.files.protocol:
            self.files.pipe_file(path, data)
            return
        # Object stores write atomically. On a local file system, the rename makes the write atomic.
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        temporary = Path(f"{path}.{token_hex(6)}.partial")
        with on_interrupt(temporary.unlink):
            try:
                temporary.write_bytes(data)
                os.replace(temporary, path)  # fsspec's `mv` would move into an existing folder of that name
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def _with_retries(
        self, action: Callable[[], Result], path: str, attempts: int = len(_WAITS) + 1
    ) -> Result:
        for wait in (*_WAITS[: attempts - 1], None):
            try:
                return action()
            except Exception as raised:
                error = _underlying(raised)
                if isinstance(error, FileNotFoundError):
                    raise NotFoundError(f"{self}: {path} does not exist; check the URL.") from None
                if isinstance(error, _NotPlain):
                    raise PrecastError(
                        f"{self}: {path}: expected a file, found a pipe, a device or a folder; remove it, and push the"
                        " artifact again."
                    ) from None
                if _is_permanent(error):
                    raise PrecastError(f"{self}: {path}: {self._explain(error)}") from None
                if wait is None:
                    raise UnreachableError(f"{self}: {path}: {self._explain(error)}") from None
                time.sleep(wait * (0.5 + random()))
        raise AssertionError("the last attempt returns or raises")

    def _explain(self, error: Exception) -> str:
        text = _hide(f"{type(error).__name__}: {error}", self.url)
        if isinstance(error, NotImplementedError) or getattr(error, "status", None) in _READ_ONLY:
            return "this store is read-only; push to another."
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            return f"access was refused ({text}); check the credentials for this store."
        return (
            f"the store does not answer correctly ({text}); check the URL and the connection, and try again."
        )


def _read_plain(path: Path, limit: int) -> bytes:
    try:
        with open_plain(path) as file:
            return file.read(limit + 1)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise _NotPlain from None
        raise


class _NotPlain(Exception):
    """A pipe, a device or a folder exists at the path of a file."""


def _underlying(error: Exception) -> Exception:
    """Return the true cause of an error that fsspec has raised.

    If a web server does not answer, or refuses a request, fsspec raises a FileNotFoundError whose cause is the true
    error. Any other FileNotFoundError is genuine, even if it has a cause.
    """
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or isinstance(cause, FileNotFoundError):
        return error
    status = getattr(cause, "status", _NOT_FOUND)
    return (
        cause
        if isinstance(cause, OSError) or (isinstance(cause, Exception) and status != _NOT_FOUND)
        else error
    )


def open_store(url: str) -> Store:
    """Open the store of an artifact's URL.

    Args:
        url: the store's URL, with the artifact's name as its last part.

    Raises:
        PrecastError: the URL is invalid, its protocol is not supported, or the package for it is missing.
    """
    shown = without_secrets(url)
    protocol, separator, rest = url.partition("://")
    if not separator:
        raise PrecastError(
            f"{shown}: expected a URL such as s3://bucket/models/NAME, or file:///folder/NAME for a folder."
        )
    name = rest.rstrip("/").rpartition("/")[2]
    parent = rest.rstrip("/").removesuffix(name)
    if "::" in url or "?" in rest or "#" in rest or not re.fullmatch("[a-z][a-z0-9+.-]*", protocol):
        raise PrecastError(f"{shown}: expected a plain URL, with one protocol and without a query.")
    if not parent or not _NAME.fullmatch(name) or name == "pieces":
        raise PrecastError(
            f"{shown}: expected a folder and a name of letters, digits, '.', '_' and '-', as in s3://bucket/models/NAME."
        )
    if protocol in _UNSUPPORTED:
        raise PrecastError(
            f"{shown}: precast does not support {protocol}://; mount the folder and give it as file:///folder/NAME."
        )
    files, folder = _file_system(protocol, parent, url)
    return Store(files=files, folder=f"{folder.rstrip('/')}/" if folder else "", name=name, url=url)


def _file_system(protocol: str, parent: str, url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise PrecastError(
            "stores need fsspec, which is not installed: pip install 'precast[store]', and the package that a protocol"
            " needs (s3fs for s3://, gcsfs for gs://)"
        ) from None
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        parent, s3_options = _s3_options(parent, fsspec.config.conf.get("s3", {}))
        options |= s3_options
    try:
        files, folder = fsspec.url_to_fs(f"{protocol}://{parent}", **options)
    except ImportError as error:
        raise PrecastError(
            f"{without_secrets(url)}: {_package(protocol)} ({_hide(str(error), url)})."
        ) from None
    except Exception as error:
        raise PrecastError(
            f"{without_secrets(url)}: the URL cannot be opened ({_hide(str(error), url)}); check the URL."
        ) from None
    return files, str(folder)


def _package(protocol: str) -> str:
    packages = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
    packages |= {"http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
    name = packages.get(protocol)
    return f"{protocol}:// needs a package that is not installed" + (f": pip install {name}" if name else "")


def _s3_options(parent: str, configured: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the bucket, and the options for s3fs.

    The options contain the key and the secret of the URL, if it has them. They turn retries off, because `Store`
    retries.
    """
    options: dict[str, Any] = {}
    if "config_kwargs" not in configured:
        options["config_kwargs"] = {"retries": {"max_attempts": 1}, "connect_timeout": 15}
    user, at, bucket = parent.rpartition("@")
    if at and ":" in user:  # without a colon, the @ is part of a folder's name
        key, _, secret = user.partition(":")
        return bucket, options | {"key": unquote(key), "secret": unquote(secret)}
    return parent, options


def without_secrets(url: str) -> str:
    """Return the URL without user, password and query."""
    protocol, separator, rest = url.partition("://")
    if protocol in ("file", "local", "memory"):
        return url
    rest = re.split("[?#]", rest)[0]
    host = rest.rpartition("@")[2]
    return f"{protocol}{separator}{'***@' if host != rest else ''}{host}"


def _hide(text: str, url: str) -> str:
    """Return a library's message without the URL's secrets, in one line of at most 300 characters."""
    text = text.replace(url, without_secrets(url))
    user = url.partition("://")[2].rpartition("@")[0]
    for secret in (user, *user.split(":"), unquote(user), *map(unquote, user.split(":"))):
        if secret:
            text = text.replace(secret, "***")
    text = re.sub(r"://[^/\s]*@", "://***@", re.sub(r"\?[^\s'\")]+", "", text))
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:300]


def _is_permanent(error: Exception) -> bool:
    status = getattr(error, "status", None)
    return (
        isinstance(error, _PERMANENT)
        or (isinstance(error, OSError) and error.errno in _PERMANENT_CODES)
        or (isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429))
        or status in _READ_ONLY
        or "Credentials" in type(error).__name__
    )
