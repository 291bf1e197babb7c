"""The depth of the JSON that a JSON Schema describes."""

from collections.abc import Iterator, Mapping
from typing import Any

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
# Maximum number of nested schemas and references that are followed.
_DEEPEST = 200


def levels(schema: Mapping[str, Any]) -> int:
    """Return the number of nested objects and arrays that a schema spells out.

    A recursive reference counts once, and so does a part that allows any value.
    """
    return _levels(schema, schema, {}, 0)


def _levels(part: Any, root: Any, known: dict[str, int], depth: int) -> int:
    """Return the levels of a part of a schema.

    Args:
        part: the part.
        root: the whole schema, to which references refer.
        known: the levels of the references that were followed already; 0 for those that are being followed.
        depth: the number of schemas around the part, including references.
    """
    if not isinstance(part, Mapping) or depth > _DEEPEST:
        return 0
    kinds = part.get("type")
    is_container = bool(part.keys() & _INNER) or any(
        kind in _CONTAINERS for kind in (kinds if isinstance(kinds, list) else [kinds])
    )
    inner = max((_levels(child, root, known, depth + 1) for child in _children(part, _INNER)), default=0)
    same = [_levels(child, root, known, depth + 1) for child in _children(part, _SAME)]
    reference = part.get("$ref")
    if isinstance(reference, str):
        if reference not in known:
            known[reference] = 0
            known[reference] = _levels(_target(root, reference), root, known, depth + 1)
        same.append(known[reference])
    return max(is_container + inner, *same, 0)


def _children(part: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[Any]:
    for key in keys:
        value = part.get(key)
        if key in _MAPPINGS and isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, list):
            yield from value
        else:
            yield value


def _target(root: Any, reference: str) -> Any:
    """Return the part that a JSON pointer such as ``#/$defs/a`` refers to; None if there is none."""
    value = root
    for key in reference.removeprefix("#").split("/")[1:]:
        value = value.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(value, Mapping) else None
    return value
