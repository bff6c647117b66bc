"""The API over the real service: every body is what the published description says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import jsonschema_rs
import msgspec
import pytest

from qmpd.errors import NotFound, StaleRevision, WrongState
from qmpd.lifecycle import State
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import MachineSpec
from qmpd.views import ExpectRequest
from qmpd_api import openapi
from qmpd_api.application import create
from qmpd_api.client import Client, Wire
from qmpd_api.server import serve

pytestmark = pytest.mark.qemu

SPEC: dict[str, Any] = {"name": "lab", "board": "riscv64-virt", "accel": "tcg", "memory_mib": 128, "labels": {"role": "test"}}
DESCRIPTION: dict[str, Any] = json.loads(openapi.encoded())


class Described:
    """A client that checks every answer against the published description."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def __call__(
        self,
        method: str,
        path: str,
        status: int,
        body: object = None,
        *,
        query: str = "",
        headers: dict[str, str] | None = None,
        **path_parameters: str,
    ) -> Any:
        """The decoded answer to a request, which has this status and is described for it."""
        target = path.format(name="lab", **path_parameters) if "id" not in path_parameters else path.format(**path_parameters)
        async with self.session.request(method, target + query, json=body, headers=headers) as reply:
            assert reply.status == status, await reply.text()
            raw = await reply.read()
            responses = DESCRIPTION["paths"][path][method.lower()]["responses"]
            assert str(status) in responses
            content = responses[str(status)].get("content", {})
            if "$ref" in responses[str(status)]:
                content = DESCRIPTION["components"]["responses"]["Error"]["content"]
            if not content:
                assert raw == b""
                return None
            if reply.content_type != "application/json":
                assert reply.headers["Content-Type"] in content
                return raw
            document = json.loads(raw)
            schema = {**content["application/json"]["schema"], "components": DESCRIPTION["components"]}
            jsonschema_rs.validator_for(schema).validate(document)
            return document


@pytest.fixture
async def api(service: Service, settings: Settings) -> AsyncIterator[Described]:
    """A described client of a daemon."""
    connector = aiohttp.UnixConnector(settings.socket)
    async with serve(create(service), settings.socket), aiohttp.ClientSession("http://localhost", connector=connector) as session:
        yield Described(session)


AT = "/v1/machines/{name}"


async def test_what_the_host_is_asked(api: Described) -> None:
    assert (await api("GET", "/v1/version", 200))["machines_running"] == 0
    boards = await api("GET", "/v1/boards", 200, query="?arch=riscv64")
    assert "riscv64-virt" in {board["id"] for board in boards}
    assert (await api("GET", "/v1/boards/{id}", 200, id="riscv64-virt"))["board"]["arch"] == "riscv64"
    await api("GET", "/v1/boards/{id}", 404, id="no-such-board")
    assert await api("GET", "/v1/emulators", 200)
    assert b"qmpd" in await api("GET", "/metrics", 200)
    assert (await api("GET", "/v1/doctor", 200))["machines"] == 0
    assert (await api("GET", "/v1/bundle", 200)).startswith(b"\x1f\x8b")
    await api("GET", "/v1/openapi.json", 200)


async def test_what_is_asked_of_a_definition(api: Described) -> None:
    assert (await api("POST", "/v1/validate", 200, SPEC))["ok"] is True
    assert (await api("POST", "/v1/validate", 200, {**SPEC, "kernel": {"image": "/no/such/kernel"}}))["ok"] is False
    assert (await api("POST", "/v1/command", 200, SPEC))["argv"][0].endswith("qemu-system-riscv64")
    problems = (await api("POST", "/v1/command", 422, {**SPEC, "board": "no-such-board"}))["details"]["problems"]
    assert problems[0]["path"] == "$.board"


async def test_a_definition_is_kept_under_its_revision(api: Described) -> None:
    created = await api("POST", "/v1/machines", 201, SPEC)
    assert (created["state"], created["labels"]) == ("stopped", {"role": "test"})
    assert (await api("POST", "/v1/machines", 409, SPEC))["code"] == "already_exists"
    stored = await api("GET", AT + "/definition", 200)
    assert stored["spec"]["uuid"] == created["uuid"]
    await api("GET", AT + "/command", 200)
    first = {"If-Match": f'"{created["revision"]}"'}
    replaced = await api("PUT", AT, 200, {**SPEC, "title": "new"}, headers=first)
    assert (replaced["title"], replaced["uuid"]) == ("new", created["uuid"])
    assert (await api("PUT", AT, 412, SPEC, headers=first))["code"] == "stale_revision"
    assert (await api("PUT", AT, 428, SPEC))["code"] == "revision_required"
    await api("DELETE", AT, 412, headers=first)
    await api("DELETE", AT, 204, headers={"If-Match": f'"{replaced["revision"]}"'})
    assert (await api("GET", AT, 404))["code"] == "not_found"


async def test_some_of_a_definition_changes_while_the_machine_runs(api: Described) -> None:
    created = await api("POST", "/v1/machines", 201, SPEC, query="?start=true")
    first = {"If-Match": f'"{created["revision"]}"'}
    assert (await api("PATCH", AT, 428, {"protected": True}))["code"] == "revision_required"
    assert (await api("PATCH", AT, 422, {"memory_mib": 64}, headers=first))["details"]["problems"]
    changed = await api("PATCH", AT, 200, {"protected": True, "title": "new", "labels": None}, headers=first)
    assert (changed["state"], changed["protected"], changed["title"], changed["labels"]) == ("running", True, "new", {"role": "test"})
    assert (await api("PATCH", AT, 412, {"protected": False}, headers=first))["code"] == "stale_revision"
    await api("POST", AT + "/stop", 200)
    assert (await api("DELETE", AT, 409))["code"] == "protected"
    await api("PATCH", AT, 200, {"protected": False}, headers={"If-Match": f'"{changed["revision"]}"'})
    await api("DELETE", AT, 204)


async def test_the_end_of_the_host_is_a_job_during_which_nothing_starts(api: Described) -> None:
    await api("POST", "/v1/machines", 201, SPEC, query="?start=true")
    job = await api("POST", "/v1/shutdown", 202, {"timeout_s": 600})
    assert (await api("POST", "/v1/shutdown", 409))["code"] == "going_down"
    assert (await api("POST", "/v1/machines", 409, {**SPEC, "name": "other"}, query="?start=true"))["code"] == "going_down"
    await api("POST", "/v1/jobs/{id}/cancel", 200, id=job["id"])
    job = await api("POST", "/v1/shutdown", 202, {"timeout_s": 0})
    while (job := await api("GET", "/v1/jobs/{id}", 200, id=job["id"]))["state"] == "running":
        await asyncio.sleep(0.05)
    assert job["result"]["left"] == 0
    assert [(end["machine"], end["method"]) for end in job["result"]["machines"]] == [("lab", "quit")]


async def test_a_life(api: Described) -> None:
    assert (await api("POST", "/v1/machines", 201, SPEC, query="?start=true"))["state"] == "running"
    assert [machine["name"] for machine in (await api("GET", "/v1/machines", 200, query="?label=role=test&state=running"))["machines"]] == [
        "lab"
    ]
    assert (await api("POST", AT + "/start", 409))["details"]["state"] == "running"
    assert (await api("DELETE", AT, 409))["code"] == "wrong_state"
    assert (await api("POST", AT + "/qmp", 200, {"execute": "query-status"}))["return"]["status"] == "running"
    assert (await api("POST", AT + "/qmp", 403, {"execute": "quit"}))["code"] == "forbidden"
    assert (await api("POST", AT + "/expect", 200, {"pattern": "OpenSBI", "from_start": True, "timeout_s": 60}))["matched"]
    assert b"OpenSBI" in await api("GET", AT + "/log", 200)
    assert (await api("POST", AT + "/pause", 200))["state"] == "paused"
    assert (await api("GET", AT + "/wait", 200, query="?state=paused"))["state"] == "paused"
    assert (await api("GET", AT + "/wait", 504, query="?state=stopped&timeout_s=0.01"))["code"] == "not_yet"
    assert (await api("POST", AT + "/resume", 200))["state"] == "running"
    await api("POST", AT + "/reset", 200)
    job = await api("POST", AT + "/shutdown", 202, {"timeout_s": 600})
    assert (await api("GET", "/v1/jobs", 200))["jobs"][0]["id"] == job["id"]
    assert (await api("POST", "/v1/jobs/{id}/cancel", 200, id=job["id"]))["state"] == "cancelled"
    assert (await api("GET", "/v1/jobs/{id}", 200, id=job["id"]))["state"] == "cancelled"
    assert (await api("POST", AT + "/stop", 200))["method"] == "quit"
    assert (await api("POST", AT + "/kill", 200))["method"] == "already-stopped"
    events = await api("GET", "/v1/events", 200, query="?since=0&machine=lab")
    assert "machine.state" in {event["kind"] for event in events["events"]}
    await api("DELETE", AT, 204)


NOT_THERE = ["start", "stop", "kill", "reset", "pause", "resume", "shutdown"]


@pytest.mark.parametrize("verb", NOT_THERE)
async def test_a_machine_that_is_not_there_is_not_found(api: Described, verb: str) -> None:
    assert (await api("POST", f"{AT}/{verb}", 404))["code"] == "not_found"


@pytest.mark.parametrize("wire", ["msgpack", "json"])
async def test_the_client_and_the_daemon_understand_each_other(service: Service, settings: Settings, wire: Wire) -> None:
    async with serve(create(service), settings.socket), Client(settings.socket, wire=wire) as client:
        view = await client.create(msgspec.convert(SPEC, MachineSpec), start=True)
        assert view.state is State.RUNNING
        found = await client.expect("lab", ExpectRequest(pattern="OpenSBI v([0-9.]+)", from_start=True, timeout_s=60))
        assert found.matched
        kept = await client.log("lab")
        assert b"OpenSBI" in kept.data
        async with client.console("lab", since=0) as console:
            frames = aiter(console)
            assert [(await anext(frames)).kind for _ in range(2)] == ["hello", "output"]
        assert await client.qmp("lab", "query-name") == {"name": "lab"}
        with pytest.raises(WrongState):
            await client.delete("lab", view.revision)
        stopped = await client.stop("lab")
        assert stopped.clean
        page = await client.events_page(machine="lab")
        assert page.events
        with pytest.raises(StaleRevision):
            await client.delete("lab", stopped.machine.revision + 1)
        await client.delete("lab", stopped.machine.revision)
        with pytest.raises(NotFound):
            await client.machine("lab")
