"""Compare two artifacts: their manifests, files, and weights."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import files
from ..artifact.manifest import WEIGHTS_FILE, Manifest, Program, Value
from ..artifact.weights import map_weights
from ..progress import Progress, Step, silent

# The number of bytes of a tensor that are compared at a time.
_BLOCK = 1 << 24


class _NoValue:
    """The type of `ABSENT`, the value of a fact that an artifact lacks."""


ABSENT = _NoValue()
Facts = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Change:
    """A difference between two artifacts.

    Attributes:
        what: name of the fact within its section.
        before: value in the first artifact; `ABSENT` for an addition.
        after: value in the second artifact; `ABSENT` for a removal.
    """

    what: str
    before: Any
    after: Any

    @property
    def is_addition(self) -> bool:
        """Return True if only the second artifact has the fact."""
        return self.before is ABSENT

    @property
    def is_removal(self) -> bool:
        """Return True if only the first artifact has the fact."""
        return self.after is ABSENT


def diff(
    before: Path, a: Manifest, after: Path, b: Manifest, progress: Progress = silent
) -> dict[str, tuple[Change, ...]]:
    """Compare two artifacts.

    Files are compared by their hashes in the manifests. Weights with different hashes are compared tensor by tensor.

    Args:
        before: folder of the first artifact.
        a: manifest of the first artifact.
        after: folder of the second artifact.
        b: manifest of the second artifact.
        progress: receives the number of bytes of weights compared.

    Returns:
        The changes by section, including sections without changes.

    Raises:
        PrecastError: weights are missing, damaged, or unreadable.
    """
    sections = {name: _changes(facts(a), facts(b)) for name, facts in _SECTIONS.items()}
    return {
        "weights": _weights(before, a, after, b, progress),
        "targets": _target_changes(a, b),
        **sections,
    }


def _changes(a: Facts, b: Facts) -> tuple[Change, ...]:
    names = dict.fromkeys((*a, *b))
    return tuple(
        Change(what=name, before=a.get(name, ABSENT), after=b.get(name, ABSENT))
        for name in names
        if name not in a or name not in b or a[name] != b[name]
    )


def _flat(record: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in dataclasses.asdict(record).items():
        yield f"{prefix}{name}", value


def _model(m: Manifest) -> Facts:
    return {"name": m.name, **dict(_flat(m.model))}


def _geometry(m: Manifest) -> Facts:
    arrays = {f"{c.name} {key}": value for c in m.cache for key, value in _flat(c) if key != "name"}
    return {"context": m.context, "slots": m.slots, "buckets": m.buckets, **arrays}


def _target_changes(a: Manifest, b: Manifest) -> tuple[Change, ...]:
    """Compare the targets in both artifacts field by field. A target in only one artifact is a single change."""
    named = [{t.name: {p.name for p in t.programs} for t in m.targets} for m in (a, b)]
    shared = {name: programs & named[1][name] for name, programs in named[0].items() if name in named[1]}
    return _changes(*(_targets(m, shared) for m in (a, b)))


def _targets(m: Manifest, shared: Mapping[str, set[str]]) -> Facts:
    """Return the facts of all targets.

    Args:
        m: the artifact's manifest.
        shared: names of the programs that both artifacts have, by target.
    """
    facts: dict[str, Any] = {"order": tuple(t.name for t in m.targets if t.name in shared)}
    for target in m.targets:
        if target.name not in shared:
            programs = ", ".join(p.name for p in target.programs)
            facts[target.name] = (
                f"{target.runtime}, {target.platform}, jaxlib {target.jaxlib}, programs {programs}"
            )
            continue
        fields = {f.name: getattr(target, f.name) for f in dataclasses.fields(target)}
        facts |= {f"{target.name} {k}": v for k, v in fields.items() if k not in ("name", "programs")}
        for program in target.programs:
            if program.name in shared[target.name]:
                facts |= _program(m, f"{target.name} {program.name}", program)
            else:
                facts[f"{target.name} {program.name}"] = f"{program.kind} of {program.tokens} tokens"
    return facts


def _program(m: Manifest, where: str, program: Program) -> Facts:
    kinds = (("argument", program.arguments), ("result", program.results))
    memory = program.memory and ", ".join(f"{k} {v}" for k, v in _flat(program.memory))
    return {
        f"{where} executable": _file(m, program.executable),
        f"{where} StableHLO": _file(m, program.stablehlo),
        f"{where} signature": tuple(
            f"{kind} {v.name}: {_value(v)}" for kind, values in kinds for v in values
        ),
        f"{where} flops": program.flops,
        f"{where} memory": memory,
    }


def _value(value: Value) -> str:
    alias = "" if value.alias is None else f", aliases {value.alias}"
    return f"{value.role} {value.dtype} {list(value.shape)}, layout {list(value.layout)}{alias}"


def _file(m: Manifest, name: str | None) -> str | None:
    return None if name is None else f"{m.files[name].bytes} bytes, sha256 {m.files[name].sha256[:12]}…"


def _tokenizer(m: Manifest) -> Facts:
    t = m.tokenizer
    return {
        "tokenizer": _file(m, t.file),
        "chat template": _file(m, t.chat_template),
        **{f"chat template {name}": _file(m, file) for name, file in t.named_templates.items()},
        "bos_token": t.bos_token,
        "eos_token": t.eos_token,
        "eos_token_ids": t.eos_token_ids,
    }


def _fidelity(m: Manifest) -> Facts:
    return {} if m.fidelity is None else dict(_flat(m.fidelity))


def _origin(m: Manifest) -> Facts:
    p = m.provenance
    sources = {
        f"source file {n}": f"{e.bytes} bytes, sha256 {e.sha256[:12]}…" for n, e in p.source_files.items()
    }
    return {"source": p.source, "licence": p.licence, "created": p.created, **sources}


def _prefixes(m: Manifest) -> Facts:
    return {
        p.name: f"{p.tokens} tokens {_file(m, p.file)}, by target {p.target}, kernels of ABI {p.kernels} for {p.isa}:"
        f" {_file(m, p.arrays)}"
        for p in m.prefixes
    }


def _other_files(m: Manifest) -> Facts:
    """Return the files that no other section compares."""
    programs = {n for t in m.targets for p in t.programs for n in (p.executable, p.stablehlo)}
    texts = (m.tokenizer.file, m.tokenizer.chat_template, *m.tokenizer.named_templates.values())
    prefixes = {n for p in m.prefixes for n in (p.file, p.arrays)}
    compared = {WEIGHTS_FILE, *texts, m.golden, *programs, *prefixes}
    return {name: _file(m, name) for name in sorted(set(m.files) - compared)}


# The sections that need one manifest at a time. The sections for targets and weights need both manifests.
_SECTIONS: Mapping[str, Callable[[Manifest], Facts]] = {
    "model": _model,
    "geometry": _geometry,
    "tokenizer": _tokenizer,
    "sampling": lambda m: m.sampling.given(),
    "golden answers": lambda m: {"golden": _file(m, m.golden)},
    "prefixes": _prefixes,
    "fidelity": _fidelity,
    "origin": _origin,
    "versions": lambda m: m.provenance.versions,
    "other files": _other_files,
}


# --- weights ------------------------------------------------------------------------------------------------


def _weights(before: Path, a: Manifest, after: Path, b: Manifest, progress: Progress) -> tuple[Change, ...]:
    if a.files[WEIGHTS_FILE] == b.files[WEIGHTS_FILE]:
        return ()
    old, new = _tensors(before, a), _tensors(after, b)
    shapes = [{name: _shape(array) for name, array in tensors.items()} for tensors in (old, new)]
    changes = _changes(*shapes)
    alike = [name for name in old if name in new and shapes[0][name] == shapes[1][name]]
    return (*changes, *_contents({name: (old[name], new[name]) for name in alike}, progress))


def _tensors(root: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    with files.open_checked(root, WEIGHTS_FILE, manifest.files[WEIGHTS_FILE], rehash=False) as file:
        return map_weights(file)


def _shape(array: np.ndarray) -> str:
    return f"{array.dtype.name} {list(array.shape)}"


def _contents(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], progress: Progress) -> Iterator[Change]:
    done, total = 0, sum(old.nbytes for old, _ in pairs.values())
    for name, (old, new) in pairs.items():
        differing = _differing(old, new)
        done += old.nbytes
        progress(Step(text="comparing weights", done=done, total=total, unit="bytes"))
        if differing:
            # Both tensors have the type and shape in `before`, so `after` gives the number of differing bytes instead.
            yield Change(what=name, before=_shape(old), after=f"{differing} of {old.nbytes} bytes differ")


def _differing(old: np.ndarray, new: np.ndarray) -> int:
    """Return the number of bytes that differ between two arrays of the same type and shape; compare block by block."""
    a, b = (array.reshape(-1).view(np.uint8) for array in (old, new))
    blocks = range(0, a.size, _BLOCK)
    return sum(int(np.count_nonzero(a[i : i + _BLOCK] != b[i : i + _BLOCK])) for i in blocks)


def to_json(sections: Mapping[str, Sequence[Change]]) -> dict[str, Any]:
    """Return the changes in plain JSON types, without keys for absent values."""
    return {
        "same": not any(sections.values()),
        "sections": {
            name: [
                {"what": c.what}
                | {k: v for k, v in (("before", c.before), ("after", c.after)) if v is not ABSENT}
                for c in changes
            ]
            for name, changes in sections.items()
        },
    }
