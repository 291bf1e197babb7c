"""Read the custom calls of programs from their bytes, before anything deserialises them.

An executable of XLA's CPU client names each twice: as ``custom_call_target``, field 28 of an ``HloInstructionProto``
(xla/service/hlo.proto), and as ``target_name``, field 2 of the ``CustomCallThunkProto`` in field 16 of a ``ThunkProto``
(xla/backends/cpu/runtime/thunk.proto). The second is the one that runs. StableHLO
holds their names among its other strings, so only installed kernels can be recognised there.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .errors import PrecastError
from .manifest import Target

_HLO = re.compile(rb"\xe2\x01([\x03-\x7f])")
_THUNK = re.compile(rb"\x82\x01[\x80-\xff]{0,4}[\x00-\x7f]\x08[\x00-\x08]\x12([\x03-\x7f])")
# Names with two leading underscores are XLA's own, and part of its compiler's ordinary output.
_NAME = re.compile(rb"(?!__)[A-Za-z_][A-Za-z0-9_.$]*")


def custom_calls_in(executable: bytes) -> set[str]:
    """Return the names of the custom calls in an executable of XLA's CPU client."""
    found = set()
    for pattern in (_HLO, _THUNK):
        for match in pattern.finditer(executable):
            name = executable[match.end() : match.end() + match[1][0]]
            if len(name) == match[1][0] and _NAME.fullmatch(name):
                found.add(name.decode())
    return found


def check_calls(root: Path, target: Target, contents: Mapping[str, bytes], installed: Iterable[str]) -> None:
    """Refuse programs with custom calls outside their manifest's list.

    Args:
        root: the artifact.
        target: the target whose programs are about to be loaded or compiled.
        contents: the target's files, by name.
        installed: the installed kernels.

    Raises:
        PrecastError: names the program and the call.
    """
    if target.runtime == "savedmodel" or target.platform == "cuda":
        return  # TensorFlow's programs are checked at their loading; XLA's GPU compiler calls its own libraries
    for program in target.programs:
        data = contents.get(target.file_of(program) or "", b"")
        if target.runtime == "stablehlo":
            calls: Sequence[str] = [name for name in installed if name.encode() in data]
        else:
            calls = sorted(custom_calls_in(data))
        if unlisted := [name for name in calls if name not in target.kernels]:
            raise PrecastError(
                f"{root}: target {target.name!r}: program {program.name!r} calls {', '.join(unlisted)}, which the"
                " manifest does not list among the target's kernels; export the model again."
            )
