"""The published description is the one that is committed, and names every route and every error."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
import jsonschema_rs
import pytest

from qmpd import errors
from qmpd_api import openapi, statuses
from qmpd_api.routes import ROUTES
from qmpd_api.statuses import STATUSES, status_of

COMMITTED = Path(__file__).parents[2] / "api" / "openapi.json"


def test_the_committed_description_is_the_generated_one() -> None:
    assert COMMITTED.read_bytes() == openapi.encoded(), "run: python -m qmpd_api.openapi > api/openapi.json"


async def test_the_daemon_serves_it(client: aiohttp.ClientSession) -> None:
    async with client.get("/v1/openapi.json") as reply:
        assert (reply.status, reply.content_type) == (200, "application/json")
        assert await reply.read() == openapi.encoded()


def test_every_route_is_in_it_once() -> None:
    paths = openapi.description()["paths"]
    assert sorted((path, method) for path in paths for method in paths[path]) == sorted(
        (route.path, route.method.lower()) for route in ROUTES
    )
    names = [route.name for route in ROUTES]
    assert len(set(names)) == len(names)


def test_every_pattern_means_the_same_in_javascript() -> None:
    text = json.dumps(openapi.description())
    assert "\\Z" not in text
    assert "(?P" not in text


def test_every_schema_is_one() -> None:
    for schema in openapi.description()["components"]["schemas"].values():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})


def leaves() -> list[type[errors.QmpdError]]:
    return [
        kind
        for module in (errors, statuses)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, errors.QmpdError) and kind is not errors.QmpdError
    ]


@pytest.mark.parametrize("kind", leaves())
def test_every_error_has_a_status_that_is_not_500(kind: type[errors.QmpdError]) -> None:
    assert status_of(kind) != 500


def test_every_code_means_one_thing() -> None:
    codes = {kind: kind.code for kind in {*leaves(), *STATUSES}}
    assert len(set(codes.values())) == len(codes)
