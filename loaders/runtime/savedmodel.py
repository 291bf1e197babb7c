"""TensorFlow as the runtime: a SavedModel's signatures are the programs, and its variables are the weights.

TensorFlow is imported only when a SavedModel is loaded. Neither jax nor jaxlib is involved. TensorFlow compiles each
program at the program's first call.
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
from .native_libraries import quiet

SAVED_MODEL = "saved_model.pb"

# Use the CPU even if TensorFlow finds a GPU, because SavedModels are tested only on the CPU.
_DEVICE = "/CPU:0"
# The operations that the functions of an export use. A SavedModel is untrusted code, and other operations could, for
# example, write files. An export also contains operations that save and restore variables, but only in functions for
# other loaders. Those functions never run here.
_OPERATIONS = frozenset(
    """
    AssignVariableOp Const DisableCopyOnRead Identity NoOp PartitionedCall Placeholder PreventGradient ReadVariableOp
    StatefulPartitionedCall VarHandleOp XlaCallModule
    """.split()
)


def signature_name(name: str) -> str:
    """Return a signature's name for an argument or result. TensorFlow bans dots, so each dot becomes "__"."""
    return name.replace(".", "__")


def manifest_name(name: str) -> str:
    """Return the manifest's name for an argument or result of a signature."""
    return name.replace("__", ".")


class Executable:
    """A signature of a SavedModel. TensorFlow compiles it at its first call."""

    compiled = True

    def __init__(self, tensorflow: Any, function: Any, program: Program) -> None:
        self._tensorflow = tensorflow
        self._function = function
        self._name = program.name
        self._arguments = [signature_name(v.name) for v in program.arguments]
        self._results = [signature_name(v.name) for v in program.results]

    def __call__(self, arguments: Sequence[Buffer]) -> list[Buffer]:
        """Run the program, as `interface.Executable` describes."""
        tf = self._tensorflow
        try:
            with tf.device(_DEVICE):
                given = zip(self._arguments, arguments, strict=True)
                results = self._function(**{name: tf.convert_to_tensor(value) for name, value in given})
        except (tf.errors.OpError, TypeError, ValueError) as error:
            raise PrecastError(
                f"TensorFlow: program {self._name!r} failed ({error}); check the artifact with precast verify."
            ) from None
        return [results[name] for name in self._results]


class Client:
    """A client that runs programs on the CPU through TensorFlow.

    A buffer is a TensorFlow tensor, or an array that the next call converts to a tensor.
    """

    def __init__(self, tensorflow: Any) -> None:
        self._tensorflow = tensorflow

    def put(self, array: np.ndarray) -> Buffer:
        with self._tensorflow.device(_DEVICE):
            return cast(Buffer, self._tensorflow.constant(array))

    def staging(self, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, Buffer]:
        array = np.zeros(shape, dtype)
        return array, cast(Buffer, array)

    def view(self, buffer: Buffer) -> np.ndarray | None:
        """Return None, because TensorFlow's tensors are immutable."""

    def get(self, buffer: Buffer) -> np.ndarray:
        return np.asarray(cast(Any, buffer))

    def free(self, buffers: Iterable[Buffer]) -> None:
        """Do nothing, because TensorFlow frees a tensor when its last reference is deleted."""


def client() -> Client:
    """Return a client for TensorFlow's CPU.

    Raises:
        PrecastError: TensorFlow is not installed, or cannot be imported.
    """
    return Client(import_tensorflow())


def import_tensorflow() -> Any:
    """Import TensorFlow, without its log messages.

    Raises:
        PrecastError: TensorFlow is not installed, or cannot be imported.
    """
    try:
        # TensorFlow reads the log level once, when it is loaded. At level 1 it logs every large allocation.
        with quiet("2"):
            import tensorflow
    except ImportError as error:
        raise PrecastError(
            f"a SavedModel needs TensorFlow, which cannot be imported ({error}): pip install 'precast[savedmodel]'"
        ) from None
    return tensorflow


def set_threads(threads: int) -> bool:
    """Set the number of TensorFlow's computing threads, which all models in this process share.

    TensorFlow starts its threads at its first operation. Return False if another number of threads has already started.
    """
    threading = import_tensorflow().config.threading
    try:
        threading.set_intra_op_parallelism_threads(threads)
    except RuntimeError:
        return False
    return True


def load(
    root: Path, target: Target, entries: Mapping[str, FileEntry], *, rehash: bool
) -> dict[str, Executable]:
    """Load a target's SavedModel, with the weights as its variables; return its programs by name.

    Args:
        root: the artifact's folder.
        target: a target with the runtime "savedmodel".
        entries: the artifact's files, as the manifest lists them.
        rehash: hash the SavedModel's files even if their hashes are recorded.

    Raises:
        PrecastError: a file in the folder differs from the manifest or is not listed there, the SavedModel contains an
            operation that no export contains, the signatures differ from the manifest, or TensorFlow cannot read the
            SavedModel.
    """
    folder = _checked_folder(root, target, entries, rehash=rehash)
    tf = import_tensorflow()
    _check_operations(folder / SAVED_MODEL)
    try:
        with tf.device(_DEVICE):
            signatures = tf.saved_model.load(str(folder)).signatures
    except Exception as error:  # TensorFlow documents no exceptions
        raise PrecastError(
            f"{folder}: TensorFlow {tf.__version__} does not load this SavedModel ({error}); export the model again"
            " with this version, or install the version that it was exported with."
        ) from None
    for program in target.programs:
        _check_signature(signatures.get(program.name), program, folder)
    return {p.name: Executable(tf, signatures[p.name], p) for p in target.programs}


def _checked_folder(root: Path, target: Target, entries: Mapping[str, FileEntry], *, rehash: bool) -> Path:
    """Return a SavedModel's folder after comparing its files with the manifest.

    Raises:
        PrecastError: a file differs from the manifest, or is not listed there. No file in the folder is exempt, because
            TensorFlow may read any of them.
    """
    named = {target.file_of(program) for program in target.programs}
    executable = next(iter(named)) or ""
    first = PurePosixPath(executable)
    if len(named) != 1 or first.name != SAVED_MODEL or len(first.parts) < 2:
        raise PrecastError(
            f"{root}: target {target.name!r}: expected all programs to share one {SAVED_MODEL} inside a"
            f" folder, found {', '.join(map(str, sorted(map(str, named))))}; export the model again."
        )
    # First check that neither the name nor a symlink leads out of the artifact.
    files.member_path(root, executable)
    inside = first.parent.as_posix()
    listed = {name for name in entries if name.startswith(f"{inside}/")}
    for name in sorted(set(_files_below(root, inside)) | listed):
        if name not in listed:
            raise PrecastError(
                f"{root}: file {name!r} is not listed in the manifest, and TensorFlow would read it; remove it, or copy"
                " or export the artifact again."
            )
        files.open_checked(root, name, entries[name], rehash=rehash).close()
    return root / inside


def _files_below(root: Path, folder: str) -> Iterator[str]:
    """Yield the name of every file below a folder of the artifact. A symlink counts as a file and is not followed."""
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
    """Refuse a SavedModel whose functions could do anything but compute.

    Raises:
        PrecastError: a function uses an operation that no export contains. The message names the operation.
    """
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    try:
        graphs = SavedModel.FromString(path.read_bytes()).meta_graphs
    except DecodeError:
        raise PrecastError(
            f"{path}: expected a SavedModel, found something else; export the model again."
        ) from None
    # For a TensorFlow 2 model, TensorFlow runs only the functions. For any other model, it would run the whole graph.
    if len(graphs) != 1 or not graphs[0].HasField("object_graph_def"):
        raise PrecastError(
            f"{path}: expected one graph of TensorFlow 2, found something else; export the model again."
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
                f"{path}: calls TensorFlow's {', '.join(unknown)}, which no export contains: do not run it; export the"
                " model again."
            )


def _functions_of(node: Any) -> Iterator[str]:
    for attribute in node.attr.values():
        yield from (function.name for function in (attribute.func, *attribute.list.func) if function.name)


def _check_signature(function: Any, program: Program, folder: Path) -> None:
    if function is None:
        raise PrecastError(f"{folder}: has no signature {program.name!r}; export the model again.")
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
    """Return a value's type in TensorFlow's notation: "int32 (8,)"."""
    return f"{value.dtype} {value.shape}"
