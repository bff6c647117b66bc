"""Requests made up from the published description, right and wrong ones: none gives a 500, and every answer is as described."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Final, TypeAlias

import hypothesis
import msgspec
import pytest
import requests
import schemathesis
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import MachineSpec
from qmpd_api import openapi
from qmpd_api.application import create
from qmpd_api.server import serve

pytestmark = pytest.mark.qemu

#: Enough to reach every field of every body over a few runs; each run begins elsewhere.
EXAMPLES: Final = 8
#: A request of these tests waits for nothing: longer means that the daemon hangs.
DEADLINE_S: Final = 60.0
CHECKS: Final = [status_code_conformance, content_type_conformance, response_schema_conformance]
MACHINE: Final = {"name": "fuzz", "board": "riscv64-virt", "accel": "tcg", "memory_mib": 64}

Case: TypeAlias = schemathesis.Case[Any]

SCHEMA = schemathesis.openapi.from_dict(json.loads(openapi.encoded()))
OPERATIONS = {found.ok().label: found.ok() for found in SCHEMA.get_all_operations() if isinstance(found, Ok)}
#: What is not made of anything that could be wrong.
PLAIN: Final = "application/octet-stream"
#: Answers after many seconds: a new daemon starts every emulator first.
SLOW: Final = frozenset({"GET /v1/boards", "GET /v1/emulators", "GET /v1/check", "GET /v1/bundle"})


@pytest.fixture
async def base_url(service: Service, settings: Settings) -> AsyncIterator[str]:
    """A daemon with one machine, behind a port of the loopback: the library that makes the requests speaks TCP only."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(settings.socket)
        async with asyncio.TaskGroup() as group:
            group.create_task(copy(reader, back), name="there")
            group.create_task(copy(there, writer), name="back")

    async with serve(create(service), settings.socket), await asyncio.start_server(carry, "localhost", 0) as proxy:
        await service.create(msgspec.convert(MACHINE, MachineSpec))
        yield f"http://localhost:{proxy.sockets[0].getsockname()[1]}"


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carries bytes until either end closes."""
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()


def shortened(case: Case, mode: GenerationMode) -> None:
    """Aims a well-formed request at the machine there is, and makes the waits short."""
    if mode is GenerationMode.NEGATIVE:
        return
    if "name" in case.path_parameters:
        case.path_parameters["name"] = MACHINE["name"]
    holder = {"wait": case.query, "expect": case.body, "shutdown": case.body}.get(case.path.rpartition("/")[2])
    if isinstance(holder, dict):
        holder["timeout_s"] = 0.01
    if isinstance(case.query, dict):
        case.query.pop("follow", None)


def kinds() -> list[tuple[str, GenerationMode]]:
    """Every operation with right requests, and with wrong ones where there is something to be wrong: of plain bytes nothing is."""
    documents = {label for label, operation in OPERATIONS.items() if any(body.media_type != PLAIN for body in operation.body)}
    wrong = [label for label, operation in OPERATIONS.items() if label in documents or any(True for _ in operation.iter_parameters())]
    return [(label, GenerationMode.POSITIVE) for label in OPERATIONS] + [(label, GenerationMode.NEGATIVE) for label in wrong]


@pytest.mark.parametrize(("label", "mode"), kinds(), ids=str)
async def test_no_request_gives_a_500(base_url: str, label: str, mode: GenerationMode) -> None:
    operation = OPERATIONS[label]
    strategy = operation.as_strategy(mode, media_type="application/json" if operation.body else None)

    @hypothesis.settings(
        max_examples=1 if label in SLOW else EXAMPLES,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=strategy)
    def ask(case: Case) -> None:
        shortened(case, mode)
        with requests.Session() as session:
            response = case.call(base_url=base_url, session=session, timeout=DEADLINE_S)
        assert response.status_code != 500, response.text
        case.validate_response(response, checks=CHECKS)

    await asyncio.to_thread(ask)
