"""The command ``precast add-target``."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.errors import log_to_stderr, printable
from ..artifact.manifest import SIGNATURE_FILE
from ..compiling.isa import audience

if TYPE_CHECKING:
    from ..add_target import Addition


def run(
    artifact: Path,
    *,
    cpu_isa: str | None,
    target: str | None,
    overwrite: bool,
    require_signature: Path | None,
) -> int:
    """Add a target to an artifact and print a summary.

    Returns:
        The exit code, 0.

    Raises:
        PrecastError: see `add_target`.
    """
    from ..add_target import add_target

    addition = add_target(
        artifact,
        isa=cpu_isa,
        source=target,
        overwrite=overwrite,
        require_signature=require_signature,
        log=log_to_stderr,
    )
    print("\n".join(map(printable, lines(addition, artifact))))
    return 0


def lines(addition: "Addition", artifact: Path) -> Iterator[str]:
    """Yield the lines of the summary.

    Args:
        addition: the result.
        artifact: the artifact's path as typed.
    """
    target = addition.target
    change = "replaced" if addition.has_replaced else "added"
    facts = f"{len(target.programs)} programs, {addition.executable_bytes:,} bytes, jaxlib {target.jaxlib}"
    yield f"{artifact}: target {target.name} {change}: {facts}, {addition.answers} answers as recorded"
    yield f"  runs on {audience(target.machine, target.cpu_features)}"
    if addition.signature_removed:
        yield f"  {SIGNATURE_FILE} was removed, because it signed the old manifest; sign the artifact again"
    yield f"  run it with: precast run {artifact} --target {target.name}"
