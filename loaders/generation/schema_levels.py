"""The depth of the JSON that a JSON Schema describes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .schema_merges import pointed

# Keys whose values describe the elements of an object or an array: one schema, a list of them, or a mapping.
_INNER = (
    "items",
    "prefixItems",
    "additionalItems",
    "additionalProperties",
    "properties",
    "patternProperties",
)
_MAPPINGS = ("properties", "patternProperties")
# Keys whose values describe the same value as the schema itself.
_SAME = ("allOf", "anyOf", "oneOf")
_CONTAINERS = ("array", "object")


class _Part(NamedTuple):
    """A part of a schema. The parts that it leads to are given by their identities.

    Attributes:
        is_container: True if the part describes an object or an array.
        fixed: the levels of the values in `const` and `enum`.
        inner: parts that describe the elements of the same object or array.
        same: parts that describe the same value.
    """

    is_container: bool
    fixed: int
    inner: list[int]
    same: list[int]


def levels(schema: Mapping[str, Any]) -> int:
    """Return the number of nested objects and arrays that a schema spells out, in linear time.

    A part that allows any value has 0 levels. In a recursive schema, each part counts once. The result is then an upper
    bound, because finding the longest path without repetition is NP-hard.
    """
    found = _parts(schema)
    known: dict[int, int] = {}
    for component in _components(found, id(schema)):
        most = _component_levels(component, found, known)
        known.update(dict.fromkeys(component, most))
    return known[id(schema)]


def _component_levels(component: Sequence[int], found: Mapping[int, _Part], known: Mapping[int, int]) -> int:
    """Return the levels of a strongly connected component, given the levels of the parts that it leads to."""
    first = found[component[0]]
    if len(component) == 1 and component[0] not in first.inner + first.same:
        inner = max((known[child] for child in first.inner), default=0)
        return max(first.is_container + inner, first.fixed, *(known[child] for child in first.same))
    members = [found[name] for name in component]
    exits = (known.get(child, 0) for part in members for child in part.inner + part.same)
    return sum(part.is_container for part in members) + max(*exits, *(part.fixed for part in members))


def _parts(schema: Mapping[str, Any]) -> dict[int, _Part]:
    """Return the schema and all parts that it leads to, by identity."""
    found: dict[int, _Part] = {}
    pending: list[Mapping[str, Any]] = [schema]
    while pending:
        part = pending.pop()
        if id(part) in found:
            continue
        inner, same = _children(part, _INNER), [*_children(part, _SAME), *_target(schema, part.get("$ref"))]
        found[id(part)] = _Part(
            is_container=_is_container(part),
            fixed=max(_value_levels(part.get("const")), _value_levels(part.get("enum")) - 1),
            inner=[id(child) for child in inner],
            same=[id(child) for child in same],
        )
        pending += inner + same
    return found


def _components(found: Mapping[int, _Part], start: int) -> Iterator[list[int]]:
    """Yield the strongly connected components, each after those that it leads to (Tarjan, 1972)."""
    numbers, lowest = {start: 0}, {start: 0}
    pending, closed = [start], set[int]()
    path = [(start, iter(found[start].inner + found[start].same))]
    while path:
        name, rest = path[-1]
        child = next(rest, None)
        if child is None:
            path.pop()
            if path:
                before = path[-1][0]
                lowest[before] = min(lowest[before], lowest[name])
            if lowest[name] == numbers[name]:
                component = [pending.pop()]
                while component[-1] != name:
                    component.append(pending.pop())
                closed.update(component)
                yield component
        elif child not in numbers:
            numbers[child] = lowest[child] = len(numbers)
            pending.append(child)
            path.append((child, iter(found[child].inner + found[child].same)))
        elif child not in closed:
            lowest[name] = min(lowest[name], numbers[child])


def _is_container(part: Mapping[str, Any]) -> bool:
    kinds = part.get("type")
    return bool(part.keys() & _INNER) or any(
        kind in _CONTAINERS for kind in (kinds if isinstance(kinds, list) else [kinds])
    )


def _children(part: Mapping[str, Any], keys: tuple[str, ...]) -> list[Mapping[str, Any]]:
    children: list[Any] = []
    for key in keys:
        value = part.get(key)
        if key in _MAPPINGS and isinstance(value, Mapping):
            children += value.values()
        else:
            children += value if isinstance(value, list) else [value]
    return [child for child in children if isinstance(child, Mapping)]


def _target(root: Any, reference: object) -> list[Mapping[str, Any]]:
    """Return the part that ``#`` or a JSON pointer such as ``#/$defs/a`` refers to; an empty list if there is none."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return []
    part = pointed(root, reference)
    return [part] if isinstance(part, Mapping) else []


def _value_levels(value: Any) -> int:
    """Return the number of nested objects and arrays in a JSON value."""
    count, layer = 0, [value]
    while layer := [each for each in layer if isinstance(each, list | Mapping)]:
        count += 1
        layer = [child for each in layer for child in (each.values() if isinstance(each, Mapping) else each)]
    return count
