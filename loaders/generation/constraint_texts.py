"""Check a constraint before its grammar is built, and refuse a constraint whose grammar would be too large.

The limits restrict llguidance to seconds and a few hundred megabytes. llguidance's own limits do not suffice, because
some of its algorithms check the limits only between steps, and a single step may take hours.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from math import prod
from typing import Any, NamedTuple

from ..artifact.errors import PrecastError
from .schema_merges import merged_size

# Maximum number of characters of each kind of constraint. llguidance takes quadratic time for regular expressions and
# for some schemas.
_LONGEST = {"json_schema": 100_000, "regex": 10_000, "grammar": 20_000, "choice": 100_000, "tools": 100_000}
# llguidance's parser accepts at most 128 levels, and the grammar around a schema uses some of them.
_DEEPEST = 100
# Every further regular expression in an intersection doubles the time. An intersection of 16 takes a second.
_MOST_INTERSECTED = 12
# Maximum of `multipleOf` with its decimal point removed. Some values around ten million take llguidance hours.
_MOST_REMAINDERS = 1_000_000
# Objects in a schema after llguidance has merged alternatives with the keys beside them: a second and 150 MB.
_MOST_MERGED = 20_000


# The kinds of constraints on tool calls. `TOOL_CHOICE`: the answer must contain calls. `STRICT`: it may.
TOOL_CHOICE, STRICT = "tool_choice", "strict"


class ConstraintText(NamedTuple):
    """The text of a constraint, from which llguidance builds a grammar.

    Attributes:
        kind: the name of the sampling parameter (json_schema, regex, grammar or choice), `TOOL_CHOICE` or `STRICT`.
        value: the schema, regular expression or grammar as a string, or the choices as a tuple of strings.
        schemas: the schemas of the tools. The grammar of calls refers to them as ``@arguments_0`` and so on.
        reasoning: the Lark rules for the reasoning before the answer; empty without reasoning.
    """

    kind: str
    value: str | tuple[str, ...]
    schemas: "tuple[ToolSchema, ...]" = ()
    reasoning: str = ""


class ToolSchema(NamedTuple):
    """The JSON Schema of a tool's arguments.

    Attributes:
        where: the name of the schema in error texts.
        text: the schema as JSON.
    """

    where: str
    text: str


def checked_constraint(given: Mapping[str, Any]) -> ConstraintText:
    """Check the constraint among the sampling parameters, and return its text.

    Args:
        given: the values of the constraint parameters that are set, by name; at least one.

    Raises:
        PrecastError: more than one constraint is set, or the constraint is malformed or exceeds a limit.
    """
    if len(given) > 1:
        first, second, *_ = given
        raise PrecastError(
            f"Sampling parameters: {first} and {second} cannot be combined; give one of them, or a grammar that covers"
            " both."
        )
    ((kind, value),) = given.items()
    if kind == "choice":
        return ConstraintText(kind, _checked_choice(value))
    if kind == "json_schema":
        return ConstraintText(kind, _checked_schema(value))
    if not isinstance(value, str) or not value.strip():
        raise PrecastError(f"Sampling parameters: {kind} must be a non-empty string, found {value!r:.60}.")
    _check_text(kind, value)
    if kind == "grammar":
        _check_grammar(value)
    return ConstraintText(kind, value)


def _check_text(kind: str, text: str) -> None:
    if len(text) > _LONGEST[kind]:
        raise PrecastError(
            f"Sampling parameters: {kind} must have at most {_LONGEST[kind]:,} characters, found {len(text):,};"
            " shorten it."
        )
    if half := re.search("[\ud800-\udfff]", text):
        raise PrecastError(
            f"Sampling parameters: {kind} must be valid Unicode, found the lone surrogate {half[0]!r}; remove it."
        )


def _check_grammar(text: str) -> None:
    """Check the number of intersections in a Lark grammar, and the JSON Schemas that the grammar contains."""
    for found in re.finditer(r"%json\s*(?=\{)", text):
        try:
            schema, _ = json.JSONDecoder().raw_decode(text, found.end())
            json.dumps(schema, allow_nan=False)
        except RecursionError:
            raise _too_deep(_parameter("grammar")) from None
        except ValueError:
            continue  # llguidance reports this error later
        _check_schema(_parameter("grammar"), schema)
    # Count every &, even in schemas, because text that looks like a schema may be regular expressions joined by &.
    if text.count("&") > _MOST_INTERSECTED:
        raise PrecastError(
            f"Sampling parameters: grammar must contain & at most {_MOST_INTERSECTED} times, found"
            f" {text.count('&')}; use fewer intersections, and write & inside a schema as \\u0026."
        )


def _checked_choice(value: Any) -> tuple[str, ...]:
    if (
        not isinstance(value, (tuple, list))
        or not value
        or not all(isinstance(text, str) and text for text in value)
    ):
        raise PrecastError(
            f"Sampling parameters: choice must be a list of non-empty strings, found {value!r:.60}."
        )
    _check_text("choice", "".join(value))
    return tuple(dict.fromkeys(value))


# --- tools --------------------------------------------------------------------------------------------------


def tool_constraint(grammar: str, schemas: Sequence[tuple[str, dict[str, Any]]], kind: str) -> ConstraintText:
    """Return the constraint of an answer that must, or may, contain tool calls.

    Args:
        grammar: the grammar of the calls. It refers to the schemas as ``@arguments_0``, ``@arguments_1`` and so on.
        schemas: pairs of a tool's name and the JSON Schema of its arguments.
        kind: `TOOL_CHOICE` or `STRICT`.

    Raises:
        PrecastError: the grammar and the schemas together are too long, or a schema exceeds a limit.
    """
    texts = [
        ToolSchema(f"tools: parameters of {name!r:.60}", json.dumps(schema, separators=(",", ":")))
        for name, schema in schemas
    ]
    size = len(grammar) + sum(len(schema.text) for schema in texts)
    if size > _LONGEST["tools"]:
        raise PrecastError(
            f"tools: with {kind}, names and parameters must have at most {_LONGEST['tools']:,} characters in total,"
            f" found {size:,}; {fewer_tools(kind)}."
        )
    for (where, _), (_, schema) in zip(texts, schemas, strict=True):
        _check_schema(where, schema)
    return ConstraintText(kind, grammar, tuple(texts))


def fewer_tools(kind: str) -> str:
    """Return the remedy for tools that are too large together."""
    return "give fewer tools, or name one tool in tool_choice" if kind == TOOL_CHOICE else "give fewer tools"


# --- JSON Schema --------------------------------------------------------------------------------------------


def _checked_schema(value: Any) -> str:
    """Check a JSON Schema, and return it as compact JSON with its properties in the original order."""
    schema = value
    if isinstance(value, str):
        _check_text("json_schema", value)
        schema = _parsed(value)
    if not isinstance(schema, Mapping):
        raise PrecastError(
            f"Sampling parameters: json_schema must be a JSON object, given as a mapping or a string, found"
            f" {value!r:.60}."
        )
    try:
        text = json.dumps(schema, allow_nan=False, separators=(",", ":"))
    except RecursionError:
        raise _too_deep(_parameter("json_schema")) from None
    except (TypeError, ValueError) as error:
        raise PrecastError(
            f"Sampling parameters: json_schema is not valid JSON: {error}; correct it."
        ) from None
    _check_text("json_schema", text)
    _check_schema(_parameter("json_schema"), json.loads(text))  # plain dictionaries and lists
    return text


def _parameter(name: str) -> str:
    """Return the name that error texts use for a sampling parameter."""
    return f"Sampling parameters: {name}"


def _check_schema(where: str, schema: dict[str, Any]) -> None:
    """Check a JSON Schema against the limits; `where` names the schema in error texts."""
    if _depth(schema) > _DEEPEST:
        raise _too_deep(where)
    _check_merges(where, schema)
    if (size := _merged_size(schema)) > _MOST_MERGED:
        raise PrecastError(
            f"{where}: expected at most {_MOST_MERGED:,} objects in a schema after merging alternatives with the keys"
            f" beside them, found about {size:,}; use fewer anyOf and oneOf beside other keys or in allOf."
        )
    guidance = schema.get("x-guidance", {})
    if not isinstance(guidance, dict) or guidance.get("lenient"):
        raise PrecastError(
            f'{where}: x-guidance must be an object that does not set "lenient", found'
            f' {json.dumps(guidance):.60}; remove x-guidance, because "lenient" ignores parts of the schema.'
        )


def _merged_size(schema: dict[str, Any]) -> int:
    try:
        return merged_size(schema)
    except RecursionError:
        return _MOST_MERGED + 1


def _parsed(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"an object has the key {json.dumps(twice)} twice")
        return found

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=no_number)
    except RecursionError:
        raise _too_deep(_parameter("json_schema")) from None
    except ValueError as error:
        raise PrecastError(
            f"Sampling parameters: json_schema is not valid JSON: {error}; correct it."
        ) from None


def _too_deep(where: str) -> PrecastError:
    return PrecastError(f"{where} must be nested at most {_DEEPEST} levels deep; move parts to $defs.")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level := [child for parent in level for child in _children(parent)]:
        depth += 1
    return depth


def _children(value: Any) -> Sequence[Any]:
    return [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()


def parts(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON pointer and the value of each object in a JSON value, outer objects before inner ones."""
    left = [("", schema)]
    while left:
        pointer, value = left.pop()
        if isinstance(value, dict):
            yield pointer, value
            left += [(f"{pointer or '#'}/{_escaped(key)}", child) for key, child in reversed(value.items())]
        elif isinstance(value, list):
            left += [(f"{pointer or '#'}/{i}", child) for i, child in reversed(list(enumerate(value)))]


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _check_merges(where: str, schema: dict[str, Any]) -> None:
    """Check the patterns and the `multipleOf` divisors that a single value may have to satisfy together.

    Raises:
        PrecastError: there are too many patterns, a pattern is too long, or a divisor has too many digits.
    """
    patterns: set[str] = set()
    divisors: set[Decimal] = set()
    merges = False
    for _, part in parts(schema):
        patterns.update(value for key in ("pattern", "format") if isinstance(value := part.get(key), str))
        if isinstance(named := part.get("patternProperties"), dict):
            patterns.update(named)
        divisor = part.get("multipleOf")
        if isinstance(divisor, int | float) and not isinstance(divisor, bool):
            divisors.add(Decimal(str(divisor)))
        alternatives = part.keys() & {"$ref", "anyOf", "oneOf"}
        merges |= (
            "allOf" in part
            or len(alternatives) > 1
            or (bool(alternatives) and not part.keys().isdisjoint(_MERGED))
        )
    if merges and len(patterns) > _MOST_INTERSECTED:
        raise PrecastError(
            f"{where}: expected at most {_MOST_INTERSECTED} patterns and formats in a schema with allOf, or with $ref,"
            f" anyOf or oneOf beside other keys, found {len(patterns)}; use fewer."
        )
    longest = max(patterns, key=len, default="")
    if len(longest) > _LONGEST["regex"]:
        raise PrecastError(
            f"{where}: a pattern must have at most {_LONGEST['regex']:,} characters, found"
            f" {len(longest):,}; shorten it."
        )
    _check_divisors(where, divisors, merges)


def _check_divisors(where: str, divisors: set[Decimal], merges: bool) -> None:
    """Check that an automaton for the divisors of `multipleOf` is small enough.

    Args:
        where: the place of the schema, for messages.
        divisors: all values of `multipleOf`.
        merges: True if a single value may have to satisfy all of them together.
    """
    worst = max(divisors, key=lambda d: _remainders({d}), default=Decimal(1))
    if _remainders(divisors if merges else {worst}) > _MOST_REMAINDERS:
        limited = "the product of all multipleOf values" if merges else "multipleOf"
        raise PrecastError(
            f"{where}: without decimal points, {limited} must be at most {_MOST_REMAINDERS:,}; use a number with fewer"
            f" digits than {worst:g}."
        )


def _remainders(divisors: set[Decimal]) -> int:
    """Return an upper bound on the states of an automaton that recognises the common multiples of all divisors."""
    places = max((-int(d.as_tuple().exponent) for d in divisors), default=0)
    return prod(int(d.scaleb(max(places, 0))) for d in divisors)


_MERGED = frozenset(
    "additionalProperties format items multipleOf pattern patternProperties prefixItems properties".split()
)
