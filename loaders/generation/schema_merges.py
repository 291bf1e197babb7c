"""The size of a JSON Schema after llguidance has merged the parts that a value must satisfy together.

Where alternatives (`anyOf`, `oneOf`) stand beside other keys or inside `allOf`, llguidance merges every alternative
with a copy of the other keys and all that they contain. If such places are nested, the schema doubles at each level.
llguidance checks its own limits only after that, when it may have taken all memory.
"""

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any
from urllib.parse import unquote

# Keys that say nothing about a value.
_SILENT = frozenset({"$schema", "$id", "$anchor", "$comment", "title", "description", "default", "examples"})
_DEFINITIONS = ("$defs", "definitions")
_COMBINING = ("anyOf", "oneOf", "allOf", "$ref")
# Alternatives beyond this number are counted as this number, so that products stay small.
_MOST = 10**9
# The target of a reference that does not lead to a part by a JSON pointer from the root. llguidance may find one
# nevertheless, by an anchor or an absolute URI, so the schema counts as too large.
_UNKNOWN = object()


def merged_size(schema: Mapping[str, Any]) -> int:
    """Return an upper estimate of the number of objects in a schema after merging.

    Args:
        schema: plain JSON. A reference to a part around itself counts as one object, because llguidance names it.

    Raises:
        RecursionError: a chain of references is too long.
    """
    return _Sizes(schema).size(schema, is_merged=False)


class _Sizes:
    """The sizes of the parts of one schema.

    Args:
        root: the schema.
    """

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root, self._has_inner_ids = root, any(map(_has_id, root.values()))
        self._known: dict[tuple[int, bool], int] = {}
        self._alternatives: dict[int, int] = {}

    def size(self, value: Any, *, is_merged: bool) -> int:
        """Return the size of a part; a part that is merged includes the parts to which it refers."""
        if value is _UNKNOWN:
            return _MOST
        if isinstance(value, list):
            return min(sum(self.size(child, is_merged=is_merged) for child in value), _MOST)
        if not isinstance(value, dict):
            return 0
        key = (id(value), is_merged)
        if key not in self._known:
            self._known[key] = 1  # for references to this part from inside
            self._known[key] = self._size(value, is_merged)
        return self._known[key]

    def _size(self, part: dict[str, Any], is_merged: bool) -> int:
        combining = [name for name in _COMBINING if name in part]
        has_others = not part.keys() <= {*_SILENT, *_DEFINITIONS, *combining}
        all_of = len(_list(part.get("allOf")))
        merges = all_of > 1 or len(combining) > 1 or (bool(combining) and has_others)
        is_merged = is_merged or merges
        defined = sum(self.size(part.get(name), is_merged=False) for name in _DEFINITIONS)
        left = [value for name, value in part.items() if name not in _SILENT and name not in _DEFINITIONS]
        inside = self.size(left, is_merged=is_merged)
        if is_merged:
            inside += self.size(self._target(part), is_merged=True)
        return min((self._count(part) if merges else 1) * (1 + inside) + defined, _MOST)

    def _count(self, part: Any) -> int:
        """Return the number of alternatives that a part has at its own level."""
        if not isinstance(part, dict):
            return _MOST if part is _UNKNOWN else 1
        if id(part) not in self._alternatives:
            self._alternatives[id(part)] = 1
            sums = (sum(map(self._count, _list(part.get(name)))) or 1 for name in ("anyOf", "oneOf"))
            products = (*map(self._count, _list(part.get("allOf"))), self._count(self._target(part)))
            self._alternatives[id(part)] = min(prod(sums) * prod(products), _MOST)
        return self._alternatives[id(part)]

    def _target(self, part: dict[str, Any]) -> Any:
        """Return the part that a reference names; None without a reference, `_UNKNOWN` without a pointer to a part."""
        if "$ref" not in part:
            return None
        reference = part["$ref"]
        # A part with an identifier of its own is the root of the references inside it.
        if self._has_inner_ids or not isinstance(reference, str) or not re.match("#(/|$)", reference):
            return _UNKNOWN
        return pointed(self._root, reference)


def pointed(root: Any, reference: str) -> Any:
    """Return the schema that ``#`` or a JSON pointer such as ``#/$defs/a`` refers to, or `_UNKNOWN`."""
    found = root
    for name in unquote(reference[1:]).split("/")[1:]:
        found = _child(found, name.replace("~1", "/").replace("~0", "~"))
    return found if isinstance(found, dict | bool) else _UNKNOWN


def _child(value: Any, name: str) -> Any:
    """Return the value under one step of a JSON pointer, or `_UNKNOWN`."""
    if isinstance(value, dict):
        return value.get(name, _UNKNOWN)
    if isinstance(value, list) and re.fullmatch("0|[1-9][0-9]{0,9}", name) and int(name) < len(value):
        return value[int(name)]
    return _UNKNOWN


def _has_id(value: Any) -> bool:
    """Return True if a schema contains an identifier that changes the meaning of references."""
    if isinstance(value, list):
        return any(map(_has_id, value))
    if not isinstance(value, dict):
        return False
    return any(isinstance(value.get(key), str) for key in ("$id", "id")) or any(map(_has_id, value.values()))


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()
