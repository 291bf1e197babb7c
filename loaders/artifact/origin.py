"""The origin of stored keys and values: the model, the programs and the instruction set that computed them.

precast's kernels compute a position with the same instructions in the same order for any chunk, batch and number of
threads. So two computations of the same tokens with the same origin have bit-identical results. Keys and values of
another origin are not reused.
"""

import hashlib
from collections.abc import Mapping

from .frozen import Frozen
from .manifest import WEIGHTS_FILE, Manifest, Target

# Version of the kernels' arithmetic. Increment it when any bit of a kernel's results changes, so that keys and values
# from earlier kernels are no longer used.
_ARITHMETIC = 1


class Origin(Frozen):
    """The model, programs and instruction set that computed keys and values, as strings for comparison and display.

    Attributes:
        weights: sha256 of the weight file.
        tokenizer: sha256 of the tokenizer file.
        cache: types and shapes of the KV cache's arrays, without the numbers of slots and positions.
        target: name of the target.
        programs: sha256 over the target's programs and the version of the kernels' arithmetic.
        kernel_abi: ABI version of precast's kernels.
        isa: instruction set that the kernels chose ("avx2").
    """

    weights: str
    tokenizer: str
    cache: str
    target: str
    programs: str
    kernel_abi: str
    isa: str

    def differences(self, other: "Origin") -> Mapping[str, tuple[str, str]]:
        """Return the differing fields by their names in messages, each as a pair: this origin's value, the other's."""
        pairs = {label: (getattr(self, field), getattr(other, field)) for field, label in _LABELS.items()}
        return {label: (mine, theirs) for label, (mine, theirs) in pairs.items() if mine != theirs}


# Names of the fields in messages, the most informative first.
_LABELS = {
    "weights": "weights",
    "cache": "KV cache",
    "tokenizer": "tokenizer",
    "target": "target",
    "programs": "programs",
    "kernel_abi": "kernel ABI",
    "isa": "instruction set",
}


def has_row_invariance(target: Target) -> bool:
    """Return True if the bits of a target's results for a position depend on neither chunk, batch nor thread count.

    precast's kernels guarantee this; XLA does not.
    """
    return target.platform == "cpu" and bool(target.kernels) and target.runtime != "savedmodel"


def is_reproducible(target: Target) -> bool:
    """Return True if every process that runs the target computes the same bits.

    A serialised executable computes the same bits in every process. StableHLO may be compiled by another version of
    XLA, which may compute other bits.
    """
    return has_row_invariance(target) and target.runtime == "pjrt"


def origin_of(manifest: Manifest, target: Target, isa: str) -> Origin:
    """Return the origin of the keys and values that a target computes if its kernels use the instruction set `isa`."""
    files = {program.name: target.file_of(program) for program in target.programs}
    hashes = [
        f"{name} {manifest.files[file].sha256}" for name, file in sorted(files.items()) if file is not None
    ]
    hashes.append(f"arithmetic {_ARITHMETIC}")
    return Origin(
        weights=manifest.files[WEIGHTS_FILE].sha256,
        tokenizer=manifest.files[manifest.tokenizer.file].sha256,
        cache=_geometry(manifest),
        target=target.name,
        programs=hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        kernel_abi=str(target.kernel_abi),
        isa=isa,
    )


def _geometry(manifest: Manifest) -> str:
    """Describe the KV cache's arrays: "cache.keys bfloat16 L=30 K=3 H=64; …"."""
    described = []
    for array in manifest.cache:
        sizes = dict(zip(array.axes, array.shape, strict=True))
        axes = " ".join(f"{letter}={sizes[letter]}" for letter in "LKH" if letter in sizes)
        window = f" window={array.window}" if array.window else ""
        described.append(f"{array.name} {array.dtype} {axes}{window}")
    return "; ".join(described)
