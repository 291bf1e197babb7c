"""Find the custom calls in the bytes of programs, before the programs are deserialised.

An executable from XLA's CPU client names each custom call twice: as ``custom_call_target``, field 28 of an
``HloInstructionProto`` (xla/service/hlo.proto), and as ``target_name``, field 2 of the ``CustomCallThunkProto`` in
field 16 of a ``ThunkProto`` (xla/backends/cpu/runtime/thunk.proto). XLA calls the function that ``target_name`` names.
StableHLO stores these names among its other strings, where only the names of installed kernels can be recognised.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .errors import PrecastError
from .manifest import Target

_HLO = re.compile(rb"\xe2\x01([\x03-\x7f])")
_THUNK = re.compile(rb"\x82\x01[\x80-\xff]{0,4}[\x00-\x7f]\x08[\x00-\x08]\x12([\x03-\x7f])")
# XLA's own custom calls start with two underscores; its compiler emits them for ordinary operations.
_NAME = re.compile(rb"(?!__)[A-Za-z_][A-Za-z0-9_.$]*")


def custom_calls_in(executable: bytes) -> set[str]:
    """Return the names of the custom calls in an executable from XLA's CPU client."""
    found = set()
    for pattern in (_HLO, _THUNK):
        for match in pattern.finditer(executable):
            name = executable[match.end() : match.end() + match[1][0]]
            if len(name) == match[1][0] and _NAME.fullmatch(name):
                found.add(name.decode())
    return found


def check_calls(root: Path, target: Target, contents: Mapping[str, bytes], installed: Iterable[str]) -> None:
    """Check that programs call only the kernels that the manifest lists.

    Args:
        root: the artifact's folder, for messages.
        target: the target whose programs are about to be loaded or compiled.
        contents: contents of the programs' files, by file name.
        installed: names of the installed kernels.

    Raises:
        PrecastError: a program makes a custom call that the manifest does not list.
    """
    # A SavedModel is checked when TensorFlow loads it. Programs for a GPU are not checked, because XLA itself uses
    # custom calls in them to call libraries such as cuBLAS.
    if target.runtime == "savedmodel" or target.platform == "cuda":
        return
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
