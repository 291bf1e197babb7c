"""TensorFlow as the runtime: the signatures of a SavedModel are the programs, its variables the weights.

TensorFlow is imported when a SavedModel is loaded and not before; neither jax nor jaxlib takes part. It compiles each
program when that is first called.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np

from ..artifact import files
from ..artifact.errors import PrecastError
from ..artifact.manifest import FileEntry, Program, Target, Value
from .interface import Buffer
from .quiet import quiet

SAVED_MODEL = "saved_model.pb"

# The device that precast is tested on, also where TensorFlow finds another.
_DEVICE = "/CPU:0"
# A SavedModel is a program that can do whatever TensorFlow can, files included. These are the operations that an
# export consists of; what saves and restores variables is there for other loaders, and nothing that is run calls it.
_OPERATIONS = frozenset(
    """
    AssignVariableOp Const DisableCopyOnRead Identity NoOp PartitionedCall Placeholder PreventGradient ReadVariableOp
    StatefulPartitionedCall VarHandleOp XlaCallModule
    """.split()
)


def signature_name(name: str) -> str:
    """What a signature calls an argument or a result: TensorFlow takes no dots, and no name has two underscores."""
    return name.replace(".", "__")


def manifest_name(name: str) -> str:
    """What the manifest calls an argument or a result of a signature."""
    return name.replace("__", ".")


class Executable:
    """A signature. TensorFlow compiles it when it is first called."""

    compiled = True

    def __init__(self, tensorflow: Any, function: Any, program: Program) -> None:
        self._tensorflow = tensorflow
        self._function = function
        self._arguments = [signature_name(v.name) for v in program.arguments]
        self._results = [signature_name(v.name) for v in program.results]

    def __call__(self, arguments: Sequence[Buffer]) -> list[Buffer]:
        """Runs the program; as `interface.Executable` says."""
        tf = self._tensorflow
        try:
            with tf.device(_DEVICE):
                given = zip(self._arguments, arguments, strict=True)
                results = self._function(**{name: tf.convert_to_tensor(value) for name, value in given})
        except (tf.errors.OpError, TypeError, ValueError) as error:
            raise PrecastError(f"the program failed in TensorFlow: {error}") from None
        return [results[name] for name in self._results]


class Client:
    """TensorFlow's CPU. A buffer is a tensor of TensorFlow's, or an array to make one of at the next call."""

    def __init__(self, tensorflow: Any) -> None:
        self._tensorflow = tensorflow

    def put(self, array: np.ndarray) -> Buffer:
        with self._tensorflow.device(_DEVICE):
            return cast(Buffer, self._tensorflow.constant(array))

    def staging(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, Buffer]:
        array = np.zeros(shape, dtype)
        return array, cast(Buffer, array)

    def get(self, buffer: Buffer) -> np.ndarray:
        return np.asarray(cast(Any, buffer))

    def free(self, buffers: Iterable[Buffer]) -> None:
        """Do nothing: TensorFlow frees a tensor with its last reference."""


def client() -> Client:
    """TensorFlow's CPU.

    Raises:
        PrecastError: when TensorFlow is not there, or cannot be imported.
    """
    return Client(import_tensorflow())


def import_tensorflow() -> Any:
    """TensorFlow, with its remarks kept to itself.

    Raises:
        PrecastError: when it is not there, or cannot be imported.
    """
    try:
        # TensorFlow reads the log level once, when it is loaded. At 1 it logs every large allocation.
        with quiet("2"):
            import tensorflow
    except ImportError as error:
        raise PrecastError(
            f"a SavedModel needs TensorFlow, which cannot be imported ({error}): pip install 'precast[savedmodel]'"
        ) from None
    return tensorflow


def load(
    root: Path, target: Target, entries: Mapping[str, FileEntry], *, verify: bool
) -> dict[str, Executable]:
    """Loads a target's SavedModel: its programs by name, with the weights as its variables.

    Args:
        root: folder of the artifact.
        target: of runtime "savedmodel".
        entries: the artifact's files.
        verify: hash the variables again, also where they were hashed before and have not changed since.

    Raises:
        PrecastError: when its folder holds anything but what the manifest lists, for an operation that no export
            has, for signatures other than the manifest's, and when TensorFlow does not read it.
    """
    folder = _checked_folder(root, target, entries, verify=verify)
    tf = import_tensorflow()
    _check_operations(folder / SAVED_MODEL)
    try:
        with tf.device(_DEVICE):
            signatures = tf.saved_model.load(str(folder)).signatures
    except Exception as error:  # whatever it stumbles over: its documentation names none
        raise PrecastError(
            f"{folder}: TensorFlow {tf.__version__} does not load this SavedModel ({error}); export the model again"
            " with this version, or install the one it was exported with."
        ) from None
    for program in target.programs:
        _check_signature(signatures.get(program.name), program, folder)
    return {p.name: Executable(tf, signatures[p.name], p) for p in target.programs}


def _checked_folder(root: Path, target: Target, entries: Mapping[str, FileEntry], *, verify: bool) -> Path:
    """The folder of a SavedModel, once each of its files has been found to be the one that the manifest lists.

    TensorFlow reads what it finds there, so nothing else may be.
    """
    named = {target.file_of(program) for program in target.programs}
    executable = next(iter(named)) or ""
    first = PurePosixPath(executable)
    if len(named) != 1 or first.name != SAVED_MODEL or len(first.parts) < 2:
        raise PrecastError(
            f"{root}: target {target.name!r}: expected the {SAVED_MODEL} of one folder as the executable of every"
            f" program, found {', '.join(map(str, sorted(map(str, named))))}; export the model again."
        )
    # Before the folder is looked into: its name may lead elsewhere, by itself or by a link.
    files.member_path(root, executable)
    inside = first.parent.as_posix()
    listed = {name for name in entries if name.startswith(f"{inside}/")}
    for name in sorted(set(_files_below(root, inside)) | listed):
        if name not in listed:
            raise PrecastError(
                f"{root}: file {name!r} is not listed in the manifest, and TensorFlow would read it; remove it, or copy"
                " or export the artifact again."
            )
        files.open_checked(root, name, entries[name], rehash=verify).close()
    return root / inside


def _files_below(root: Path, folder: str) -> Iterator[str]:
    """Names of everything below a folder of the artifact that is no folder itself; links are not followed."""
    try:
        with os.scandir(root / folder) as found:
            entries = list(found)
    except OSError as error:
        raise PrecastError(
            f"{root}: folder {folder!r} cannot be read ({error.strerror}); copy or export the artifact again."
        ) from None
    for entry in entries:
        name = f"{folder}/{entry.name}"
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(root, name)
        else:
            yield name


def _check_operations(path: Path) -> None:
    """Refuses a SavedModel whose functions could do anything but compute."""
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    try:
        graphs = SavedModel.FromString(path.read_bytes()).meta_graphs
    except DecodeError:
        raise PrecastError(
            f"{path}: expected a SavedModel, found something else; export the model again."
        ) from None
    # Of such a model TensorFlow runs functions alone; of others it would run the graph around them.
    if len(graphs) != 1 or not graphs[0].HasField("object_graph_def"):
        raise PrecastError(
            f"{path}: expected one graph of TensorFlow 2, found another; export the model again."
        )
    functions = graphs[0].graph_def.library.function
    run = set(graphs[0].object_graph_def.concrete_functions) | {
        called for function in functions for node in function.node_def for called in _functions_of(node)
    }
    for function in functions:
        if function.signature.name not in run:
            continue
        if unknown := sorted({node.op for node in function.node_def} - _OPERATIONS):
            raise PrecastError(
                f"{path}: it calls TensorFlow's {', '.join(unknown)}, which no export does: do not run it; export the"
                " model again."
            )


def _functions_of(node: Any) -> Iterator[str]:
    for attribute in node.attr.values():
        yield from (function.name for function in (attribute.func, *attribute.list.func) if function.name)


def _check_signature(function: Any, program: Program, folder: Path) -> None:
    if function is None:
        raise PrecastError(f"{folder}: it has no signature {program.name!r}; export the model again.")
    _, inputs = function.structured_input_signature
    for what, values, found in (
        ("arguments", program.arguments, inputs),
        ("results", program.results, function.structured_outputs),
    ):
        expected = {signature_name(v.name): _described(v) for v in values}
        given = {name: f"{spec.dtype.name} {spec.shape}" for name, spec in found.items()}
        if given != expected:
            raise PrecastError(
                f"{folder}: signature {program.name!r}: expected {what} {expected!r:.300}, found {given!r:.300}; export"
                " the model again."
            )


def _described(value: Value) -> str:
    """A value as TensorFlow writes a tensor's type: "int32 (8,)"."""
    return f"{value.dtype} {value.shape}"
