"""The commands ``precast add-prefix`` and ``precast remove-prefix``."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact.errors import PrecastError, log_to_stderr, printable
from ..artifact.frozen import Frozen
from ..artifact.json_records import parse_json
from ..artifact.manifest import SIGNATURE_FILE
from ..artifact.units import size_text

if TYPE_CHECKING:
    from ..add_prefix import PrefixChange

# The maximum size of a file, which is larger than any text that fits in a context.
_MAX_BYTES = 64 << 20


class PrefixFiles(Frozen):
    """The files that contain a prefix's text and tools, and the values of further variables of the chat template."""

    system: Path | None
    chat: Path | None
    text: Path | None
    tools: Path | None
    template_variables: Mapping[str, Any]


def add(
    artifact: Path,
    name: str,
    given: PrefixFiles,
    *,
    target: str | None,
    overwrite: bool,
    require_signature: Path | None,
    threads: int | None,
) -> int:
    """Add a prefix to an artifact and print a summary.

    Returns:
        The exit code, 0.

    Raises:
        PrecastError: a file cannot be read or has the wrong form; see also `add_prefix`.
    """
    from ..add_prefix import PrefixSource, add_prefix
    from .answer import read_tools

    if sum(path is not None for path in (given.system, given.chat, given.text)) != 1:
        raise PrecastError("add-prefix: expected one of --system, --chat and --text; give exactly one.")
    for option, value in (("--tools", given.tools), ("--template-variable", given.template_variables)):
        if value and given.text is not None:
            raise PrecastError(
                f"add-prefix: {option} needs a chat template; give --system or --chat instead of --text."
            )
    source = PrefixSource(
        system=None if given.system is None else _text(given.system),
        chat=None if given.chat is None else _messages(given.chat),
        text=None if given.text is None else _text(given.text),
        tools=None if given.tools is None else read_tools(given.tools),
        template_variables=given.template_variables,
    )
    change = add_prefix(
        artifact,
        name,
        source,
        target=target,
        overwrite=overwrite,
        require_signature=require_signature,
        threads=threads,
        log=log_to_stderr,
    )
    print("\n".join(map(printable, _added(change, artifact))))
    return 0


def remove(artifact: Path, name: str, *, require_signature: Path | None) -> int:
    """Remove a prefix from an artifact and print a summary.

    Returns:
        The exit code, 0.

    Raises:
        PrecastError: see `remove_prefix`.
    """
    from ..add_prefix import remove_prefix

    change = remove_prefix(artifact, name, require_signature=require_signature, log=log_to_stderr)
    removed = f"{artifact}: prefix {name} removed: {size_text(change.bytes)}"
    print("\n".join(map(printable, (removed, *_signature(change)))))
    return 0


def _added(change: "PrefixChange", artifact: Path) -> Iterator[str]:
    prefix = change.prefix
    verb = "replaced" if change.has_replaced else "added"
    yield f"{artifact}: prefix {prefix.name} {verb}: {prefix.tokens} tokens, {size_text(change.bytes)}"
    yield f"  target {prefix.target} with kernels for {prefix.isa} reuses it in prompts that begin with the prefix"
    yield from _signature(change)


def _signature(change: "PrefixChange") -> Iterator[str]:
    if change.signature_removed:
        yield f"  {SIGNATURE_FILE} was removed, because it signed the old manifest; sign the artifact again"


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise PrecastError(f"{path}: cannot be read ({error.strerror or error}); check the path.") from None
    if len(data) > _MAX_BYTES:
        raise PrecastError(f"{path}: expected at most {_MAX_BYTES} bytes, found more; shorten the text.")
    return data


def _text(path: Path) -> str:
    try:
        return _read(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise PrecastError(f"{path}: expected UTF-8 text, found other bytes; convert the file.") from None


def _messages(path: Path) -> list[dict[str, Any]]:
    remedy = "write a JSON list of objects"
    value = parse_json(_read(path), str(path), remedy)
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise PrecastError(f"{path}: expected a list of messages, found something else; {remedy}.")
    return value
