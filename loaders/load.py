"""From a folder to a model that generates."""

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from .artifact import compat, files
from .artifact.errors import PrecastError
from .artifact.manifest import MANIFEST_FILE, WEIGHTS_FILE, Manifest, Target, parse_manifest
from .artifact.record import MAX_JSON_BYTES
from .artifact.weights import map_weights, numpy_dtype
from .engine import Engine
from .generate import Model
from .runtime import pjrt
from .tokenizer import Tokenizer


def find_artifact(path: Path) -> Path:
    """The artifact at `path`, or the only one in it.

    Raises:
        PrecastError: when there is none, or more than one.
    """
    # The functions of os.path, unlike pathlib's, also answer for names that no file system takes.
    if os.path.isfile(path / MANIFEST_FILE):
        return path
    if not os.path.isdir(path):
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise PrecastError(
            f"{path}: expected the folder of an artifact, but it {what}; precast export makes one."
        )
    inside = sorted(p.parent for p in path.glob(f"*/{MANIFEST_FILE}") if not p.parent.name.startswith("."))
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = ", ".join(p.name for p in inside)
        raise PrecastError(f"{path}: expected one artifact, found {len(inside)} ({names}); name one of them.")
    raise PrecastError(
        f"{path}: expected an artifact, found no {MANIFEST_FILE} in it; precast export makes one."
    )


def read_manifest(root: Path) -> Manifest:
    """Reads and checks the manifest of the artifact at `root`.

    Raises:
        PrecastError: when it is missing or not understood.
    """
    return parse_manifest(files.read(root, MANIFEST_FILE, limit=MAX_JSON_BYTES), str(root / MANIFEST_FILE))


def load(
    path: str | Path,
    *,
    verify: bool = False,
    target: str | None = None,
    compile: bool = False,
    log: Callable[[str], None] | None = None,
) -> Model:
    """Loads an artifact: no tracing, and no compiling unless asked for.

    Args:
        path: its folder, or a folder with exactly one artifact in it.
        verify: hash every file again, also those that were hashed before and have not changed since.
        target: name of the target to run; the first that fits the machine by default.
        compile: whether a target may be compiled from its StableHLO. Each compilation is logged.
        log: where messages go; standard error by default.

    Raises:
        PrecastError: when the artifact is not whole, not understood, or does not run on this machine.
    """
    root = find_artifact(Path(path))
    manifest = read_manifest(root)
    chosen = compat.choose_target(manifest, pjrt.this_machine(), str(root), name=target, may_compile=compile)
    contents = {
        name: files.read_checked(root, name, manifest.files[name])
        for name in sorted(_needed(manifest, chosen))
    }
    if verify:
        for name in sorted(set(manifest.files) - set(contents) - {WEIGHTS_FILE}):
            files.read_checked(root, name, manifest.files[name])
    with files.open_checked(root, WEIGHTS_FILE, manifest.files[WEIGHTS_FILE], force=verify) as file:
        weights = map_weights(file)
    _check_weights(chosen, weights, root)
    client = pjrt.client()
    # XLA loads programs without holding Python's lock, and the tokenizer is parsed meanwhile: both take about as long.
    with ThreadPoolExecutor(1) as background:
        loading = background.submit(_executables, root, chosen, contents, client, log or _to_stderr)
        tokenizer = _tokenizer(manifest, contents)
        executables = loading.result()
    engine = Engine(manifest=manifest, target=chosen, executables=executables, weights=weights, client=client)
    return Model(
        engine=engine,
        tokenizer=tokenizer,
        manifest=manifest,
        target=chosen,
        compiles=sum(executable.compiled for executable in executables.values()),
    )


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


def _needed(manifest: Manifest, target: Target) -> set[str]:
    """Files that are read whole: programs, tokenizer, template."""
    programs = {target.file_of(p) for p in target.programs}
    return {
        n for n in (*programs, manifest.tokenizer.file, manifest.tokenizer.chat_template) if n is not None
    }


def _executables(
    root: Path, target: Target, contents: dict[str, bytes], client: pjrt.Client, log: Callable[[str], None]
) -> dict[str, pjrt.Executable]:
    executables = {}
    if target.runtime == "stablehlo" and date.today().isoformat() > target.stablehlo_expires:
        log(
            f"{root}: the StableHLO was promised to compile until {target.stablehlo_expires}; trying all the same"
        )
    for program in target.programs:
        results = [pjrt.Result(value.shape, numpy_dtype(value.dtype)) for value in program.results]
        name = target.file_of(program)
        assert name is not None  # the manifest has been checked for that
        make = client.compile if target.runtime == "stablehlo" else client.load
        if target.runtime == "stablehlo":
            log(f"compiling {program.name} from StableHLO …")
        executables[program.name] = make(contents[name], results, str(root / name))
    return executables


def _check_weights(target: Target, weights: dict, root: Path) -> None:
    for program in target.programs:
        for value in program.arguments:
            if value.role not in ("table", "weight"):
                continue
            array = weights.get(value.name)
            if array is None or array.shape != value.shape or array.dtype.name != value.dtype:
                found = "nothing" if array is None else f"{array.dtype.name} {list(array.shape)}"
                raise PrecastError(
                    f"{root}: program {program.name!r} expects weight {value.name!r} of {value.dtype}"
                    f" {list(value.shape)}, {WEIGHTS_FILE} holds {found}."
                )


def _tokenizer(manifest: Manifest, contents: dict[str, bytes]) -> Tokenizer:
    spec = manifest.tokenizer
    try:
        template = None if spec.chat_template is None else contents[spec.chat_template].decode("utf-8")
    except UnicodeDecodeError:
        raise PrecastError(
            f"{manifest.name}: {spec.chat_template} is not UTF-8 text; export the model again."
        ) from None
    return Tokenizer.from_json(
        contents[spec.file],
        chat_template=template,
        bos_token=spec.bos_token,
        eos_token=spec.eos_token,
    )
