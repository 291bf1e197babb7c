"""What is done to an artifact: for each kind of case, a function from a `Random` to the changes.

A change of a file other than the manifest goes with its new hash into the manifest, unless a kind says otherwise: the
hash check is passed, and what lies behind it is met.
"""

import base64
import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from mutate import NAMES, mutate_bytes, mutate_json, odd_value, write_json
from templates import program
from tokenizers_hostile import hostile_tokenizer

MANIFEST, SIGNATURE, WEIGHTS = "manifest.json", "manifest.json.sig", "weights.safetensors"


def key_of(root: Path) -> Path:
    """The public key of who signed the artifact, beside its folder."""
    return root.parent / "keys" / "public.pem"


@dataclass(frozen=True)
class Special:
    """What stands in the place of a file: a link ("link", with where it leads), a pipe, a folder, a socket."""

    kind: str
    to: str = ""


Change = bytes | Special | None  # new contents, something else, or gone


@dataclass(frozen=True, kw_only=True)
class Case:
    """A mutated artifact, as changes to the whole one, and how it is loaded."""

    changes: Mapping[str, Change]
    allow_compile: bool = False
    rehash: bool = False
    target: str | None = None
    index: bytes | None = None  # of a store to pull the artifact from, instead
    signed: bool = False  # its signature is checked, instead
    texts: tuple[str, ...] = ("the cat",)


@dataclass(frozen=True)
class Base:
    """The whole artifact that cases are made from."""

    root: Path
    files: dict[str, bytes] = field(default_factory=dict)

    @staticmethod
    def read(root: Path) -> "Base":
        paths = (p for p in sorted(root.rglob("*")) if p.is_file())
        return Base(root, {p.relative_to(root).as_posix(): p.read_bytes() for p in paths})

    @cached_property
    def manifest(self) -> Any:
        return json.loads(self.files[MANIFEST])

    @cached_property
    def index(self) -> Any:
        """What a store says of the artifact, with one piece a file."""
        entries = {
            n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in self.files.items()
        }
        files = {name: {**entry, "pieces": [dict(entry)]} for name, entry in entries.items()}
        return {"index_version": 1, "manifest": entries[MANIFEST]["sha256"], "files": files}

    def ending(self, suffix: str) -> list[str]:
        return [name for name in self.files if name.endswith(suffix)]

    def rehashed(
        self, changed: Mapping[str, bytes], edit: Callable[[Any], None] = lambda _: None
    ) -> dict[str, Change]:
        """The changes, and a manifest that knows them."""
        manifest = copy.deepcopy(self.manifest)
        for name, data in changed.items():
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        edit(manifest)
        return {**changed, MANIFEST: write_json(manifest)}


TEXTS = (
    *(
        "",
        "the cat",
        "a\0b",
        "é\U0001f600" * 20,
        "<0x-1><0x00><0xFF>",
        "</s><s><|im_end|>",
        "a" * 3000,
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!",
    ),
    *("\u202e\ufeff\u200d", " " * 500, "\n" * 500, "ﷺ" * 200, "e" + "\u0301" * 500),
)


def _some_texts(random: Random) -> tuple[str, ...]:
    return tuple(random.sample(TEXTS, 3))


def manifest(base: Base, random: Random) -> Case:
    tree = mutate_json(base.manifest, random)
    return Case(
        changes={MANIFEST: write_json(tree)},
        allow_compile=random.random() < 0.05,
        rehash=random.random() < 0.2,
    )


def manifest_bytes(base: Base, random: Random) -> Case:
    return Case(changes={MANIFEST: mutate_bytes(base.files[MANIFEST], random)})


def weights(base: Base, random: Random) -> Case:
    """The safetensors header, its length, and the data behind it."""
    return Case(changes=base.rehashed({WEIGHTS: _mutate_safetensors(base.files[WEIGHTS], random)}))


def _mutate_safetensors(data: bytes, random: Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    match random.randrange(5):
        case 0:
            header = mutate_bytes(header, random)
        case 1:
            length_field = random.choice(
                (0, 1, 2**63, 2**64 - 1, len(data), len(data) - 8, length + 1, length - 64, 100 << 20)
            )
            return length_field.to_bytes(8, "little") + header + body
        case 2:
            body = random.choice((b"", body[:-1], body + b"\0", body * 2, body[: len(body) // 2]))
        case _:
            header = write_json(mutate_json(json.loads(header), random))
            header += b" " * (-(8 + len(header)) % 64)
    return len(header).to_bytes(8, "little") + header + body


def prefix(base: Base, random: Random) -> Case:
    """The tokens of a stored prefix, its keys and values, or its entry in the manifest."""
    entries = base.manifest["prefixes"]
    number = random.randrange(len(entries))
    tokens, arrays = entries[number]["file"], entries[number]["arrays"]
    match random.randrange(5):
        case 0:
            changed = {tokens: write_json(mutate_json(json.loads(base.files[tokens]), random))}
        case 1:
            changed = {arrays: _mutate_safetensors(base.files[arrays], random)}
        case 2:
            changed = {arrays: mutate_bytes(base.files[arrays], random)}
        case 3:
            changed = {name: mutate_bytes(base.files[name], random) for name in (tokens, arrays)}
        case _:
            changed_entry = mutate_json(entries[number], random)
            return Case(changes=base.rehashed({}, lambda tree: _put(tree["prefixes"], number, changed_entry)))
    return Case(changes=base.rehashed(changed), rehash=random.random() < 0.2)


def _put(values: list[Any], index: int, value: Any) -> None:
    values[index] = value


def weights_and_manifest(base: Base, random: Random) -> Case:
    """The manifest and the header agree about a tensor, and only the programs know better."""
    data, name = base.files[WEIGHTS], random.choice(_tensors(base))
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    shape, types = (
        header[name]["shape"],
        {"F32": "float32", "BF16": "bfloat16", "I8": "int8", "U8": "uint8", "F16": "float16"},
    )
    dtype = header[name]["dtype"]
    shape = random.choice(
        (shape[::-1], [*shape, 1], [1, *shape], [_product(shape)], [0], [2**40, 0], shape[1:])
    )
    if _product(shape) * 2 == _product(header[name]["shape"]) or random.random() < 0.3:
        dtype = random.choice(sorted(types))
    header[name] |= {"shape": shape, "dtype": dtype}
    if random.random() < 0.5:  # the file as these shapes have it
        size = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}
        at, begin = 0, 8 + length
        pieces = []
        for entry in sorted(header.values(), key=lambda e: e["data_offsets"]):
            count, start = _product(entry["shape"]) * size[entry["dtype"]], entry["data_offsets"][0]
            pieces.append(data[begin + start :][:count].ljust(count, b"\0") if count < 1 << 24 else b"")
            entry["data_offsets"], at = [at, at + count], at + count
        body = b"".join(pieces)
    else:
        body = data[8 + length :]
    text = write_json(header)
    text += b" " * (-(8 + len(text)) % 64)

    def edit(tree: Any) -> None:
        for target in tree["targets"]:
            for one in target["programs"]:
                for value in one["arguments"]:
                    if value["name"] == name:
                        value |= {"shape": shape, "dtype": types[dtype], "layout": list(range(len(shape)))}

    return Case(changes=base.rehashed({WEIGHTS: len(text).to_bytes(8, "little") + text + body}, edit))


def _tensors(base: Base) -> list[str]:
    data = base.files[WEIGHTS]
    return sorted(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def stablehlo(base: Base, random: Random) -> Case:
    """StableHLO that is compiled on request; the executables of its target are made not to fit."""
    name = random.choice(base.ending(".stablehlo"))
    other = base.files[random.choice(base.ending(".stablehlo"))]
    data = other if random.random() < 0.05 else mutate_bytes(base.files[name], random)
    target = next(t for t in base.manifest["targets"] if any(p["stablehlo"] == name for p in t["programs"]))

    def edit(tree: Any) -> None:
        tree["targets"] = [t for t in tree["targets"] if t["name"] == target["name"]]
        if target["runtime"] == "pjrt":
            tree["targets"][0]["jaxlib"] = "0.0.1"

    return Case(changes=base.rehashed({name: data}, edit), allow_compile=True)


def executable(base: Base, random: Random) -> Case:
    """Native code, and what XLA keeps around it."""
    name = random.choice(base.ending(".xla"))
    other = base.files[random.choice(base.ending(".xla"))]
    data = other if random.random() < 0.05 else mutate_bytes(base.files[name], random)
    return Case(changes=base.rehashed({name: data}))


def tokenizer(base: Base, random: Random) -> Case:
    tree = json.loads(base.files["tokenizer.json"])
    if random.random() < 0.5:
        tree = hostile_tokenizer(tree, random)
    if random.random() < 0.7:
        tree = mutate_json(tree, random)
    data = write_json(tree)
    if random.random() < 0.1:
        data = mutate_bytes(data, random)
    return Case(changes=base.rehashed({"tokenizer.json": data}), texts=_some_texts(random))


def template(base: Base, random: Random) -> Case:
    source = program(random)
    data = (
        source.encode("utf-8", "surrogatepass")
        if random.random() < 0.97
        else mutate_bytes(source.encode("utf-8", "replace"), random)
    )
    return Case(changes=base.rehashed({"chat_template.jinja": data}))


def golden(base: Base, random: Random) -> Case:
    tree = mutate_json(json.loads(base.files["golden.json"]), random)
    data = write_json(tree) if random.random() < 0.8 else mutate_bytes(base.files["golden.json"], random)
    return Case(changes=base.rehashed({"golden.json": data}), rehash=random.random() < 0.3)


def altered(base: Base, random: Random) -> Case:
    """A file that is not what its hash says."""
    name = random.choice([n for n in base.files if n != MANIFEST])
    return Case(changes={name: mutate_bytes(base.files[name], random)}, rehash=True)


def folder(base: Base, random: Random) -> Case:
    """Links, pipes, folders and gaps where files should be, and files that nobody listed."""
    changes: dict[str, Change] = {}
    for _ in range(random.choice((1, 1, 2, 4))):
        name = random.choice(
            (
                *base.files,
                "programs",
                "programs/cpu",
                "manifest.json",
                "manifest.json.sig",
                "weights.safetensors",
                "extra.bin",
            )
        )
        changes[name] = random.choice(
            (
                *(
                    Special("link", f"../outside/{name}"),
                    Special("link", "../outside/secret"),
                    Special("link", "/etc/passwd"),
                ),
                *(
                    Special("link", name.rpartition("/")[2]),
                    Special("link", "."),
                    Special("link", "/dev/zero"),
                    Special("link", ".."),
                ),
                *(
                    Special("pipe"),
                    Special("folder"),
                    Special("socket"),
                    None,
                    b"",
                    b"{}",
                    b"\x80\x04cos\nsystem\n",
                ),
            )
        )
    if random.random() < 0.3:
        tree = mutate_json(base.manifest, random)
        listed = list(base.manifest["files"])
        tree_text = write_json(tree).replace(
            json.dumps(random.choice(listed)).encode(), json.dumps(random.choice(NAMES)).encode()
        )
        changes.setdefault(MANIFEST, tree_text)
    return Case(changes=changes, rehash=random.random() < 0.5)


def names(base: Base, random: Random) -> Case:
    """A name that leads elsewhere, wherever the manifest uses a file; what lies there has the right hash."""
    old, new = random.choice(list(base.manifest["files"])), random.choice((*NAMES, odd_value("a/b", random)))
    new = str(
        random.choice(
            (new, f"../outside/{old}", f"linked/{old}", f"{base.root}/{old}", f"/proc/self/cwd/{old}")
        )
    )
    text = write_json(base.manifest).replace(json.dumps(old).encode(), json.dumps(new).encode())
    changes: dict[str, Change] = {MANIFEST: text}
    if random.random() < 0.5:
        changes |= {
            "linked": Special("link", "../outside"),
            "link": Special("link", "../outside/secret"),
            "pipe": Special("pipe"),
        }
    return Case(changes=changes, rehash=random.random() < 0.5)


def store(base: Base, random: Random) -> Case:
    """The index of a store that an artifact is pulled from."""
    data = write_json(mutate_json(base.index, random))
    return Case(
        changes={}, index=data if random.random() < 0.8 else mutate_bytes(write_json(base.index), random)
    )


def signature(base: Base, random: Random) -> Case:
    """The signature, from its bytes to the statement that is signed in it; or another manifest than was signed."""
    whole = base.files[SIGNATURE]
    match random.randrange(4):
        case 0:
            return Case(changes={SIGNATURE: mutate_bytes(whole, random)}, signed=True)
        case 1:
            return Case(changes={SIGNATURE: write_json(mutate_json(json.loads(whole), random))}, signed=True)
        case 2:
            bundle = json.loads(whole)
            statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
            changed = write_json(mutate_json(statement, random))
            bundle["dsseEnvelope"]["payload"] = base64.b64encode(changed).decode()
            return Case(changes={SIGNATURE: write_json(bundle)}, signed=True)
        case _:
            return Case(changes={MANIFEST: mutate_bytes(base.files[MANIFEST], random)}, signed=True)


@dataclass(frozen=True)
class Kind:
    """How cases are made, their share of all cases, and seconds that one may take."""

    make: Callable[[Base, Random], Case]
    share: float
    limit_s: int = 30
    native: bool = (
        False  # a mutated program: its crash must become a sentence by the trial in a child process
    )


# The kinds that an artifact may lack the files for, and the remedies.
SIGNATURE_REMEDY = (
    "needs a signed artifact with its public key in keys/public.pem beside its folder; sign it with precast sign, or"
    " leave --artifact out"
)
PREFIX_REMEDY = "needs an artifact with a prefix; add one with precast add-prefix, or leave --artifact out"


def missing(base: Base) -> Mapping[str, str]:
    """Return the kinds of cases that the artifact cannot be used for, each with its remedy."""
    found = {} if SIGNATURE in base.files and key_of(base.root).exists() else {"signature": SIGNATURE_REMEDY}
    return found if base.manifest.get("prefixes") else {**found, "prefix": PREFIX_REMEDY}


KINDS: Mapping[str, Kind] = {
    "manifest": Kind(manifest, 0.22),
    "manifest_bytes": Kind(manifest_bytes, 0.09),
    "weights": Kind(weights, 0.12),
    "weights_and_manifest": Kind(weights_and_manifest, 0.03),
    "tokenizer": Kind(tokenizer, 0.12),
    "template": Kind(template, 0.11),
    "golden": Kind(golden, 0.03),
    "prefix": Kind(prefix, 0.04),
    "names": Kind(names, 0.04),
    "folder": Kind(folder, 0.03),
    "altered": Kind(altered, 0.02),
    "store": Kind(store, 0.04),
    "signature": Kind(signature, 0.02),
    "stablehlo": Kind(stablehlo, 0.03, limit_s=120, native=True),
    "executable": Kind(executable, 0.06, limit_s=60, native=True),
}


def make(base: Base, kind: str, seed: int) -> Case:
    """The case of a kind and a seed; the same for the same artifact."""
    return KINDS[kind].make(base, Random(f"{kind}:{seed}"))
