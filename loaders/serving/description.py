"""Descriptions of the routes: OpenAPI for programs, and a page for people that loads nothing from elsewhere."""

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.metadata import version
from typing import Any

from pydantic.json_schema import models_json_schema

from .reply_schemas import ERRORS, REPLIES
from .route import ApiRoute
from .schema import built

_JSON = "application/json"
_REF = "#/components/schemas/{model}"
_STYLE = (
    ":root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}"
    "body{max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.2rem .6rem;border-bottom:1px solid #8884;"
    "vertical-align:top}code{font-size:.9em}summary{cursor:pointer}"
)


def openapi(routes: Sequence[ApiRoute]) -> dict[str, Any]:
    """Return the OpenAPI description of routes."""
    schemas = [built(schema) for route in routes if (schema := route.schema) is not None]
    names, definitions = models_json_schema([(schema, "validation") for schema in schemas], ref_template=_REF)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        body = None if route.schema is None else names[(route.schema, "validation")]
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, body)
    return {
        "openapi": "3.1.0",
        "info": {"title": "precast", "version": version("precast")},
        "paths": paths,
        "components": {
            "schemas": {**definitions.get("$defs", {}), **ERRORS, **REPLIES},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(route: ApiRoute, body: Mapping[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "summary": route.summary,
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_"),
        "responses": {
            "200": {"description": "The answer.", "content": _content(route)},
            "default": {"description": "An error.", "content": {_JSON: {"schema": _error(route)}}},
        },
    }
    if not route.is_public:
        found["security"] = [{"bearer": []}, {"key": []}, {}]
    if variables := re.findall(r"\{(\w+)\}", route.path):
        found["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in variables
        ]
    if body is not None:
        found["requestBody"] = {"required": True, "content": {_JSON: {"schema": body}}}
    return found


def _content(route: ApiRoute) -> dict[str, Any]:
    """Return the media types of a reply, with their schemas."""
    schema = {"type": "string"} if route.reply is None else {"$ref": _REF.format(model=route.reply)}
    found = {route.media_type: {"schema": schema}}
    if route.schema is not None and "stream" in route.schema.model_fields:
        found["text/event-stream"] = {"schema": {"$ref": _REF.format(model="event")}}
    return found


def _error(route: ApiRoute) -> dict[str, Any]:
    """Return the schema of an error, which also depends on the header anthropic-version."""
    names = dict.fromkeys([f"{route.api}_error", "anthropic_error"])
    found = [{"$ref": _REF.format(model=name)} for name in names]
    return found[0] if len(found) == 1 else {"anyOf": found}


def page(routes: Sequence[ApiRoute]) -> str:
    """Return the page about routes, in HTML."""
    described = openapi(routes)
    sections = "".join(_section(route, described["components"]["schemas"]) for route in routes)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>precast: API</title><style>{_STYLE}</style>'
        '<h1>precast: API</h1><p>For programs: <a href="/openapi.json">openapi.json</a>. A request with a'
        f" parameter that is not listed here is refused.</p>{sections}</html>"
    )


def _section(route: ApiRoute, schemas: Mapping[str, Any]) -> str:
    head = f"<h2><code>{route.method} {escape(route.path)}</code></h2><p>{escape(route.summary)}</p>"
    if (schema := route.schema) is None:
        return head
    rows = "".join(_rows(schema.model_json_schema(ref_template=_REF)))
    table = f"<table><tr><th>parameter</th><th>type</th><th>required</th></tr>{rows}</table>"
    return f"{head}<details><summary>Parameters</summary>{table}</details>"


def _rows(schema: Mapping[str, Any]) -> Iterator[str]:
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        kind = escape(", ".join(dict.fromkeys(_kinds(field))))
        yield (
            f"<tr><td><code>{escape(name)}</code></td><td>{kind}</td><td>{'yes' if name in required else ''}</td></tr>"
        )


def _kinds(field: Mapping[str, Any]) -> Iterator[str]:
    """Yield the types that a parameter may have."""
    for branch in field.get("anyOf", [field]):
        if "enum" in branch or "const" in branch:
            yield " or ".join(map(repr, branch.get("enum", [branch.get("const")])))
        elif (kind := branch.get("type", "object")) != "null":
            limits = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "maxLength": "at most"}
            bounds = [f"{word} {branch[key]}" for key, word in limits.items() if key in branch]
            yield " ".join([kind, *bounds])
