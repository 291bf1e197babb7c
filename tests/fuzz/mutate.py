"""Mutations of bytes and of JSON, for `kinds.py`. Whatever is random comes from the `Random` given."""

import copy
import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

# --- bytes --------------------------------------------------------------------------------------------------

EDGES = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\0" * 8,
    b"\xff" * 8,
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"A" * 64,
)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """One to eight small injuries."""
    result = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 8))):
        random.choice((_flip, _flip, _flip, _set, _cut, _insert, _copy, _truncate, _zero))(result, random)
    return bytes(result)


def _place(data: bytearray, random: Random) -> int:
    return random.randrange(len(data) + 1)


def _flip(data: bytearray, random: Random) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _set(data: bytearray, random: Random) -> None:
    edge, at = random.choice(EDGES), _place(data, random)
    data[at : at + len(edge)] = edge


def _cut(data: bytearray, random: Random) -> None:
    at = _place(data, random)
    del data[at : at + random.choice((1, 2, 7, 8, 64, 1000))]


def _insert(data: bytearray, random: Random) -> None:
    at = _place(data, random)
    data[at:at] = random.choice((random.choice(EDGES), random.randbytes(random.choice((1, 4, 33)))))


def _copy(data: bytearray, random: Random) -> None:
    start, at, length = _place(data, random), _place(data, random), random.choice((4, 16, 100))
    data[at : at + length] = data[start : start + length]


def _truncate(data: bytearray, random: Random) -> None:
    if random.random() < 0.3:
        del data[_place(data, random) :]


def _zero(data: bytearray, random: Random) -> None:
    at, length = _place(data, random), random.choice((1, 8, 64, 512))
    data[at : at + length] = bytes(len(data[at : at + length]))


# --- JSON ---------------------------------------------------------------------------------------------------


class Raw(str):
    """JSON text that no Python value gives: NaN, a nest too deep to build, a number of a thousand digits."""


class Pairs(list):
    """An object as pairs, so that a key may stand twice."""


NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 63, 64, 65, 255, 256, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63)),
    *(0.5, -0.0, 1.5, 1e-320, 1e308, Raw("1e999"), Raw("-1e999"), Raw("NaN"), Raw("Infinity")),
    *(Raw("1" + "0" * 500), Raw("9" * 6000), Raw("1e-400"), Raw("0x10"), Raw("01"), Raw("1.")),
)
TEXTS: tuple[Any, ...] = (
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "\n",
        "a\nb",
        "\x1b[2J\x1b]0;x\x07",
        "\u2028",
        "\u202e",
        "\ufeff",
        "\U0010ffff",
        "é",
        "e\u0301",
    ),
    *(
        Raw('"\\ud800"'),
        Raw('"\\udfff\\ud800"'),
        Raw('"\\u0000"'),
        "%s%n{0}{}",
        "{{7*7}}",
        "__class__",
        "None",
        "null",
        "nan",
    ),
    *("x" * 300, "x" * 70_000, "/" * 5000, "a/" * 2000 + "a", "\U0001f600" * 1000),
    *(
        "<0x-1>",
        "<0x00>",
        "<0xFFF>",
        "<0xZZ>",
        "any",
        "cpu",
        "float32",
        "int4",
        "float64",
        "object",
        "O",
        ">f4",
        "bfloat16",
    ),
)
NAMES = (
    *(
        "..",
        ".",
        "/",
        "./manifest.json",
        "../outside/secret",
        "../outside/weights.safetensors",
        "/etc/passwd",
    ),
    *(
        "programs/../../outside/secret",
        "programs//cpu",
        "programs",
        "link",
        "linked/secret",
        "pipe",
        "C:\\x",
        "..\\outside\\secret",
    ),
    *(
        "file:///etc/passwd",
        "manifest.json",
        "README.md",
        "golden.json",
        "tokenizer.json",
        "weights.safetensors",
        "\0",
        "a\0",
    ),
    *(
        "/proc/self/mem",
        "/dev/zero",
        "/dev/stdin",
        "weights.safetensors/",
        "WEIGHTS.SAFETENSORS",
        "weights.safetensors\n",
    ),
)
OTHERS: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [None], {"": None}, [0] * 1000, {"a": 1}),
    *(
        Raw("[" * 60 + "]" * 60),
        Raw("[" * 2000 + "]" * 2000),
        Raw("[" * 200_000),
        Raw('{"a":' * 3000 + "1" + "}" * 3000),
    ),
    *(Raw("["), Raw("}"), Raw(""), Raw("[1,]"), Raw("'x'")),
)


def write_json(value: Any) -> bytes:
    """As `json.dumps`, and `Raw` and `Pairs` as they are."""
    return "".join(_written(value)).encode("utf-8", "surrogatepass")


def _written(value: Any) -> Iterator[str]:
    if isinstance(value, Raw):
        yield str(value)
    elif isinstance(value, dict | Pairs):
        yield "{"
        for i, (key, item) in enumerate(value.items() if isinstance(value, dict) else value):
            yield f"{',' if i else ''}{json.dumps(key)}:"
            yield from _written(item)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for i, item in enumerate(value):
            yield "," if i else ""
            yield from _written(item)
        yield "]"
    else:
        yield json.dumps(value)


_Place = tuple[Any, Any]  # a list or an object, and an index or a key in it


def places(tree: Any) -> list[_Place]:
    """Every place in a tree that holds a value."""
    found, left = [], [tree]
    while left:
        node = left.pop()
        keys: Any = node if isinstance(node, dict) else ()
        if isinstance(node, list) and not isinstance(node, Pairs):
            keys = range(len(node))
        for key in keys:
            found.append((node, key))
            left.append(node[key])
    return found


def mutate_json(tree: Any, random: Random) -> Any:
    """A changed copy: one to four changes, at places drawn so that rare kinds of place are as likely as common ones."""
    tree = {"root": copy.deepcopy(tree)}
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        where = [p for p in places(tree) if p[0] is not tree or random.random() < 0.05]
        if where:
            random.choice(_CHANGES)(tree, _drawn(where, random), where, random)
    return tree.get("root", Raw(""))


def _drawn(where: list[_Place], random: Random) -> _Place:
    # Of the lists of a manifest, the arguments of programs would take nearly every draw.
    key = random.choice(sorted({str(key) for _, key in where if not isinstance(key, int)} or {""}))
    named = [p for p in where if p[1] == key]
    return random.choice(named if named and random.random() < 0.6 else where)


def odd_value(old: Any, random: Random) -> Any:
    """A value that is odd where `old` stood; mostly of its type."""
    if random.random() < 0.2:
        return random.choice((*NUMBERS, *TEXTS, *NAMES, *OTHERS))
    if isinstance(old, bool) or old is None or isinstance(old, list | dict):
        return random.choice(OTHERS)
    if isinstance(old, int | float):
        near = (old + 1, old - 1, old * 2, -old, old // 2, old + 64)
        return random.choice((random.choice(NUMBERS), random.choice(near)))
    cut = random.randrange(len(old) + 1)
    near_text = (old[:cut], old + "x", old[:cut] + random.choice("\0/.é ") + old[cut:], old.upper())
    return random.choice((random.choice(TEXTS), random.choice(NAMES), random.choice(near_text)))


def _replace(_: Any, place: _Place, __: Any, random: Random) -> None:
    node, key = place
    node[key] = odd_value(node[key] if not isinstance(node[key], Raw) else None, random)


def _delete(_: Any, place: _Place, __: Any, random: Random) -> None:
    del place[0][place[1]]


def _double(tree: Any, place: _Place, where: list[_Place], random: Random) -> None:
    """An element, or a key, twice."""
    node, key = place
    if isinstance(node, list):
        many = 2 if isinstance(node[key], list | dict | Raw) else 500
        node[key:key] = [copy.deepcopy(node[key])] * random.choice((1, 1, 2, many))
        return
    parent = next((p for p in places(tree) if p[0][p[1]] is node), None)
    if parent is not None:
        parent[0][parent[1]] = Pairs([*node.items(), (key, random.choice((node[key], None, 1)))])


def _swap(_: Any, place: _Place, where: list[_Place], random: Random) -> None:
    node, key = place
    alike = [p for p in where if type(p[0][p[1]]) is type(node[key])]
    other, its = random.choice(alike)
    node[key], other[its] = copy.deepcopy(other[its]), copy.deepcopy(node[key])


def _take(_: Any, place: _Place, where: list[_Place], random: Random) -> None:
    """The value of another place with the same key, or of any."""
    node, key = place
    alike = [p for p in where if p[1] == key and p[0] is not node] or where
    other, its = random.choice(alike)
    node[key] = copy.deepcopy(other[its])


def _rename(_: Any, place: _Place, __: Any, random: Random) -> None:
    node, key = place
    if isinstance(node, dict):
        node[str(random.choice((*NAMES, "x", key + "x", "__class__")))] = node.pop(key)


def _add(_: Any, place: _Place, __: Any, random: Random) -> None:
    node = place[0]
    if isinstance(node, dict):
        node[random.choice(("x", "auto_map", "format_version", "__metadata__", ""))] = random.choice(
            (1, "x", None)
        )
    else:
        node.insert(random.randrange(len(node) + 1), random.choice((*NUMBERS[:20], "x", None)))


def _everywhere(_: Any, place: _Place, where: list[_Place], random: Random) -> None:
    """The same value, wherever it stands, becomes the same other one: this gets past checks of consistency."""
    old = place[0][place[1]]
    if isinstance(old, bool | dict | list) or old is None:
        return _replace(_, place, where, random)
    new = odd_value(old, random) if not isinstance(old, Raw) else 1
    same = [(node, key) for node, key in where if type(node[key]) is type(old) and node[key] == old]
    # Not a megabyte, hundreds of times.
    for node, key in same if isinstance(new, int | float) or len(str(new)) < 1000 else same[:3]:
        node[key] = new
    return None


_CHANGES: tuple[Callable[..., None], ...] = (
    *(_replace,) * 6,
    *(_everywhere,) * 4,
    *(_take, _swap) * 2,
    *(_delete, _double, _rename, _add),
)
