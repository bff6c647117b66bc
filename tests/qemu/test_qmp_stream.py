"""QMP over a WebSocket: a real QEMU behind the API, and a program that sends many commands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import msgspec
import pytest

from qmpd.errors import Forbidden, Invalid, NotFound, QmpdError, WrongState
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import MachineSpec
from qmpd_api.application import create
from qmpd_api.client import Client
from qmpd_api.server import serve
from qmpd_api.streams_client import QMP_PROTOCOL

pytestmark = pytest.mark.qemu


@pytest.fixture
async def client(service: Service, settings: Settings) -> AsyncIterator[Client]:
    async with serve(create(service), settings.socket), Client(settings.socket) as made:
        await made.create(MachineSpec(name="m", board="x86_64-q35", accel="tcg", memory_mib=16), start=True, paused=True)
        yield made


async def test_commands_are_answered_one_after_the_other(client: Client) -> None:
    async with client.qmp_session("m") as qmp:
        status = await qmp.execute("query-status")
        assert isinstance(status, dict)
        assert status["status"] == "prelaunch"
        names = await asyncio.gather(*(qmp.execute("query-name") for _ in range(50)))
        assert names == [{"name": "m"}] * 50
        assert await qmp.execute("qom-get", {"path": "/machine", "property": "type"}) == await client.qmp(
            "m", "qom-get", {"path": "/machine", "property": "type"}
        )


@pytest.mark.parametrize(
    ("command", "arguments", "error"),
    [
        ("system_reset", {}, Forbidden),
        ("getfd", {"fdname": "x"}, Forbidden),
        ("query-nonsense", {}, Invalid),
        ("qom-get", {"path": "/machine", "nonsense": 1}, Invalid),
    ],
)
async def test_an_error_is_the_answer_to_its_command_and_not_the_end_of_the_session(
    client: Client, command: str, arguments: dict[str, object], error: type[QmpdError]
) -> None:
    async with client.qmp_session("m") as qmp:
        with pytest.raises(error):
            await qmp.execute(command, arguments)
        assert await qmp.execute("query-name") == {"name": "m"}


async def test_a_machine_that_stops_is_an_answer_too(client: Client) -> None:
    async with client.qmp_session("m") as qmp:
        await client.kill("m")
        with pytest.raises(WrongState):
            await qmp.execute("query-status")


async def test_a_machine_that_is_not_there_is_an_ordinary_answer(client: Client) -> None:
    with pytest.raises(NotFound):
        async with client.qmp_session("nothing"):
            pytest.fail("there is none")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("", "undecodable"),
        ("junk", "undecodable"),
        ("[]", "undecodable"),
        ("{}", "invalid"),
        ('{"execute": "query-status", "extra": 1}', "invalid"),
        ('{"execute": "a b"}', "invalid"),
        ('{"execute": "query-status", "arguments": {"x": 1e999}}', "undecodable"),
        ("[" * 1000, "undecodable"),
    ],
)
async def test_what_is_no_command_ends_the_session_with_the_reason(client: Client, settings: Settings, message: str, reason: str) -> None:
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(settings.socket)) as session,
        session.ws_connect("http://localhost/v1/machines/m/qmp", protocols=(QMP_PROTOCOL,)) as socket,
    ):
        await socket.send_str(message)
        answer = await socket.receive()
        assert answer.type is aiohttp.WSMsgType.CLOSE
        assert str(answer.extra).startswith(f"{reason}: ")


async def test_an_answer_carries_the_id_of_its_command(client: Client, settings: Settings) -> None:
    assert client.target == settings.socket
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(settings.socket)) as session,
        session.ws_connect("http://localhost/v1/machines/m/qmp") as socket,
    ):
        for number in (1, "two"):
            await socket.send_str(msgspec.json.encode({"execute": "query-name", "id": number}).decode())
            assert await socket.receive_json() == {"return": {"name": "m"}, "id": number}
        await socket.send_str('{"execute": "stop", "id": 3}')
        refused = await socket.receive_json()
        assert (refused["id"], refused["error"]["code"]) == (3, "forbidden")
