"""The published description of the API (OpenAPI 3.1), made from the route table and the types. `python -m qmpd_api.openapi` prints it."""

from __future__ import annotations

import json
import sys
from functools import cache
from typing import Any, Final

import msgspec

import qmpd
from qmpd import errors
from qmpd.errors import QmpdError
from qmpd.migration.parcels import ITEM_PATTERN
from qmpd.spec import NAME_PATTERN, WORD_PATTERN
from qmpd.views import ErrorBody
from qmpd_api.idempotency import HEADER as IDEMPOTENCY_KEY
from qmpd_api.media import Media
from qmpd_api.routes import ROUTES, Route
from qmpd_api.statuses import status_of

#: What can befall any request, and any request with a body.
_ALWAYS: Final[tuple[type[QmpdError], ...]] = (errors.Undecodable, errors.Forbidden, errors.Misdirected, errors.Invalid)
_WITH_BODY: Final[tuple[type[QmpdError], ...]] = (errors.TooLarge, errors.UnsupportedMedia)
_REFERENCE: Final = "#/components/schemas/{name}"
_SEGMENTS: Final = {"name": NAME_PATTERN, "id": WORD_PATTERN, "item": ITEM_PATTERN}
_TEXT: Final = {"type": "string"}
_ERROR: Final = {"$ref": "#/components/responses/Error"}


def description() -> dict[str, Any]:
    """The document."""
    kinds = _types()
    schemas, components = msgspec.json.schema_components(kinds, schema_hook=_anything, ref_template=_REFERENCE)
    schema_of = dict(zip(map(repr, kinds), schemas, strict=True))
    paths: dict[str, dict[str, object]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "qmpd", "version": qmpd.__version__, "description": qmpd.__doc__},
        "servers": [{"url": "http://localhost", "description": "over the daemon's Unix socket"}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(components.items())),
            "responses": {"Error": {"description": "An error", "content": _content(schema_of[repr(ErrorBody)])}},
        },
    }
    return {key: _portable(value) for key, value in document.items()}


@cache
def encoded() -> bytes:
    """The document as it is committed and served."""
    return (json.dumps(description(), indent=2, ensure_ascii=False) + "\n").encode()


def _anything(kind: type) -> dict[str, Any]:
    """The schema of the values whose shape is not ours to say: QMP arguments and results."""
    if kind is object:
        return {"description": "Any value"}
    raise NotImplementedError(f"{kind} has no schema")


def _types() -> list[Any]:
    kinds: list[Any] = [ErrorBody]
    for route in ROUTES:
        for kind in (route.body, route.answer, *(field.type for field in msgspec.structs.fields(route.query))):
            if kind is not None and repr(kind) not in map(repr, kinds):
                kinds.append(kind)
    return kinds


def _operation(route: Route[Any, Any], schema_of: dict[str, dict[str, Any]]) -> dict[str, object]:
    operation: dict[str, object] = {
        "operationId": route.name,
        "summary": route.summary,
        "x-qmpd-right": route.right,
        "parameters": [*_path_parameters(route), *_query_parameters(route, schema_of), *_header_parameters(route)],
        "responses": {str(route.status): _success(route, schema_of), **_failures(route)},
    }
    if route.body is not None:
        operation["requestBody"] = {"required": route.body_needed, "content": _content(schema_of[repr(route.body)])}
    elif route.takes is not None:
        operation["requestBody"] = {"required": True, "content": {route.takes: {}}}
    return operation


def _path_parameters(route: Route[Any, Any]) -> list[dict[str, object]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {**_TEXT, "pattern": pattern}}
        for name, pattern in _SEGMENTS.items()
        if f"{{{name}}}" in route.path
    ]


def _query_parameters(route: Route[Any, Any], schema_of: dict[str, dict[str, Any]]) -> list[dict[str, object]]:
    return [
        {"name": field.encode_name, "in": "query", "required": field.required, "schema": schema_of[repr(field.type)]}
        for field in msgspec.structs.fields(route.query)
    ]


def _header_parameters(route: Route[Any, Any]) -> list[dict[str, object]]:
    parameters: list[dict[str, object]] = []
    if route.method == "POST":
        parameters.append({"name": IDEMPOTENCY_KEY, "in": "header", "required": False, "schema": _TEXT})
    if route.revision in {"optional", "needed"}:
        parameters.append({"name": "If-Match", "in": "header", "required": route.revision == "needed", "schema": _TEXT})
    return parameters


def _success(route: Route[Any, Any], schema_of: dict[str, dict[str, Any]]) -> dict[str, object]:
    response: dict[str, object] = {"description": route.summary}
    if route.produces is not None:
        response["content"] = {route.produces: {}}
    elif route.answer is not None:
        response["content"] = _content(schema_of[repr(route.answer)])
    if route.revision != "none" and route.answer is not None:
        response["headers"] = {"ETag": {"description": "The revision, in quotes", "schema": _TEXT}}
    return response


def _failures(route: Route[Any, Any]) -> dict[str, object]:
    kinds = {
        *route.errors,
        *_ALWAYS,
        *(_WITH_BODY if route.body is not None or route.takes is not None else ()),
        *((errors.Busy,) if route.pool != "none" else ()),
    }
    by_status: dict[int, list[str]] = {}
    for kind in sorted(kinds, key=lambda kind: kind.code):
        by_status.setdefault(status_of(kind), []).append(kind.code)
    failures: dict[str, object] = {str(status): {**_ERROR, "description": ", ".join(codes)} for status, codes in sorted(by_status.items())}
    return {**failures, "default": _ERROR}


def _content(schema: dict[str, Any]) -> dict[str, object]:
    return {str(media): {"schema": schema} for media in Media}


def _portable(value: Any) -> Any:
    r"""The same with regular expressions as JSON Schema has them: Python's `\Z` is ECMAScript's `$`."""
    if isinstance(value, dict):
        return {
            key: item.replace(r"\Z", "$") if key == "pattern" and isinstance(item, str) else _portable(item) for key, item in value.items()
        }
    return [_portable(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.stdout.buffer.write(encoded())
