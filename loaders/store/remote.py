"""Where artifacts are pushed to and pulled from: a folder of a file system that fsspec knows, named by a URL.

What a URL may hold of secrets (``s3://KEY:SECRET@bucket/…``) is in no message and on no disk.
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

# Seconds between attempts, each drawn from half of it to one and a half.
_WAITS = (0.5, 1.0, 2.0)
# What no second attempt changes.
_FINAL = (
    FileExistsError,
    ImportError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    PermissionError,
)
_FINAL_CODES = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM}
# What a web server says to a PUT that it has no use for.
_READ_ONLY = (405, 501)
# fsspec knows it, but not without its cache of listings, and shows files that are half written.
_NO_STORES = ("sftp", "ssh")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


_NOT_FOUND = 404  # of HTTP


class Missing(PrecastError):
    """What was asked for is not in the store."""


class Unreachable(PrecastError):
    """The store did not answer, or not as one that works."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """An open store, and the name of one artifact in it.

    Attributes:
        files: fsspec's file system.
        folder: the store's own, as that file system names it, with a slash at its end.
        name: the artifact's.
        url: of the artifact; it may hold secrets.
    """

    files: Any
    folder: str
    name: str
    url: str

    def __str__(self) -> str:
        return without_secrets(self.url)

    def read(self, path: str, most: int, *, attempts: int = len(_WAITS) + 1) -> bytes:
        """Contents of a file, or their first `most` + 1 bytes.

        Raises:
            Missing: when there is no such file.
            Unreachable: when the store does not answer.
            PrecastError: when it refuses.
        """
        return self._patiently(lambda: self._read(self.folder + path, most), path, attempts)

    def size(self, path: str) -> int | None:
        """Bytes of a file; None where there is none."""
        try:
            size: int = self._patiently(lambda: self.files.info(self.folder + path)["size"], path)
        except Missing:
            return None
        return size

    def write(self, path: str, data: bytes) -> None:
        """Puts a file in its place at once, also where one was.

        Raises:
            PrecastError: when the store does not take it.
        """
        try:
            self._patiently(lambda: self._write(self.folder + path, data), path)
        except Missing:
            raise PrecastError(
                f"{self}: there is no such bucket or folder to write to; make it, or check the URL."
            ) from None

    def _read(self, path: str, most: int) -> bytes:
        if "file" in self.files.protocol:
            return _read_plain(Path(path), most)
        if "http" not in self.files.protocol:
            data: bytes = self.files.cat_file(path, start=0, end=most + 1)
            return data
        # A server may send all of a file whatever part was asked for.
        with self.files.open(path, "rb", block_size=0) as file:
            blocks, left = [], most + 1
            while left and (block := file.read(left)):
                blocks.append(block)
                left -= len(block)
            return b"".join(blocks)

    def _write(self, path: str, data: bytes) -> None:
        if "file" not in self.files.protocol:
            self.files.pipe_file(path, data)
            return
        # Object stores show a file when it is whole; a folder does so for one that is renamed.
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        temporary = Path(f"{path}.{token_hex(6)}.partial")
        with on_interrupt(temporary.unlink):
            try:
                temporary.write_bytes(data)
                os.replace(temporary, path)  # fsspec's `mv` would move into an existing folder of that name
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def _patiently(self, act: Callable[[], Result], path: str, attempts: int = len(_WAITS) + 1) -> Result:
        for wait in (*_WAITS[: attempts - 1], None):
            try:
                return act()
            except Exception as raised:
                error = _behind(raised)
                if isinstance(error, FileNotFoundError):
                    raise Missing(f"{self}: {path} is not there; check the URL.") from None
                if isinstance(error, _NotPlain):
                    raise PrecastError(
                        f"{self}: {path} is not a plain file (a pipe, a device or a folder); remove it, and have the"
                        " artifact pushed again."
                    ) from None
                if _is_final(error):
                    raise PrecastError(f"{self}: {path}: {self._told(error)}") from None
                if wait is None:
                    raise Unreachable(f"{self}: {path}: {self._told(error)}") from None
                time.sleep(wait * (0.5 + random()))
        raise AssertionError("the last attempt returns or raises")

    def _told(self, error: Exception) -> str:
        text = _hide(f"{type(error).__name__}: {error}", self.url)
        if isinstance(error, NotImplementedError) or getattr(error, "status", None) in _READ_ONLY:
            return "this store can only be read; push to another."
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            return f"access was refused ({text}); check the credentials, as this kind of store takes them."
        return f"the store does not answer as it should ({text}); check the URL and the connection, and try again."


def _read_plain(path: Path, most: int) -> bytes:
    try:
        with open_plain(path) as file:
            return file.read(most + 1)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise _NotPlain from None
        raise


class _NotPlain(Exception):
    """A pipe, device or folder stands in place of a file."""


def _behind(error: Exception) -> Exception:
    """What went wrong: of a web server that does not answer, or refuses, fsspec says that the file is not found.

    Other stores have causes too, which say in their own words that nothing is there.
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
    """Opens the store that a URL leads to; its last part is the name of an artifact.

    Raises:
        PrecastError: when the URL is no such URL, or leads to no store, or the package that its protocol needs is not
            installed.
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
        raise PrecastError(f"{shown}: expected a plain URL, without a query and of one protocol.")
    if not parent or not _NAME.fullmatch(name) or name == "pieces":
        raise PrecastError(
            f"{shown}: expected a folder and a name of letters, digits, '.', '_' and '-': s3://bucket/models/NAME."
        )
    if protocol in _NO_STORES:
        raise PrecastError(
            f"{shown}: {protocol}:// is no store that precast knows; mount the folder and give it as file:///folder/NAME."
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
        parent, own = _s3_options(parent, fsspec.config.conf.get("s3", {}))
        options |= own
    try:
        files, folder = fsspec.url_to_fs(f"{protocol}://{parent}", **options)
    except ImportError as error:
        raise PrecastError(
            f"{without_secrets(url)}: {_package(protocol)} ({_hide(str(error), url)})."
        ) from None
    except Exception as error:
        raise PrecastError(
            f"{without_secrets(url)}: this URL cannot be opened ({_hide(str(error), url)}); check it."
        ) from None
    return files, str(folder)


def _package(protocol: str) -> str:
    packages = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
    packages |= {"http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub"}
    name = packages.get(protocol)
    return f"{protocol}:// needs a package that is not installed" + (f": pip install {name}" if name else "")


def _s3_options(parent: str, configured: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Key and secret out of the URL, where they stand in it; and one layer of attempts instead of three."""
    options: dict[str, Any] = {}
    if "config_kwargs" not in configured:
        options["config_kwargs"] = {"retries": {"max_attempts": 1}, "connect_timeout": 15}
    user, at, bucket = parent.rpartition("@")
    if at and ":" in user:  # an @ may also stand in the name of a folder
        key, _, secret = user.partition(":")
        return bucket, options | {"key": unquote(key), "secret": unquote(secret)}
    return parent, options


def without_secrets(url: str) -> str:
    """The URL without what stands before an ``@`` and behind a ``?``."""
    protocol, separator, rest = url.partition("://")
    if protocol in ("file", "local", "memory"):
        return url
    rest = re.split("[?#]", rest)[0]
    host = rest.rpartition("@")[2]
    return f"{protocol}{separator}{'***@' if host != rest else ''}{host}"


def _hide(text: str, url: str) -> str:
    """A library's message, cut short, without what the URL keeps secret."""
    text = text.replace(url, without_secrets(url))
    user = url.partition("://")[2].rpartition("@")[0]
    for secret in (user, *user.split(":"), unquote(user), *map(unquote, user.split(":"))):
        if secret:
            text = text.replace(secret, "***")
    text = re.sub(r"://[^/\s]*@", "://***@", re.sub(r"\?[^\s'\")]+", "", text))
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:300]


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None)
    return (
        isinstance(error, _FINAL)
        or (isinstance(error, OSError) and error.errno in _FINAL_CODES)
        or (isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429))
        or status in _READ_ONLY
        or "Credentials" in type(error).__name__
    )
