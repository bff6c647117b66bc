"""A stand-in for the daemon: answers on a Unix socket what a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import msgspec
import pytest
from aiohttp import web
from multidict import MultiDict

from qmpd.errors import NotFound, QmpdError
from qmpd.lifecycle import State
from qmpd.views import ErrorBody, MachineList, MachineView, StopView

#: Nothing here takes a fraction of this; a test that waits longer has failed.
PATIENCE_S: Final = 60.0

Channel = Callable[[web.WebSocketResponse, "Asked"], Awaitable[None]]
Answer = object


class Asked(msgspec.Struct, kw_only=True):
    """One request as it came."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: object = None

    @property
    def route(self) -> str:
        """Method and path."""
        return f"{self.method} {self.path}"


class StandIn:
    """The answers by route (`GET /v1/version`); a list is used up from the front, its last element stays."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.answers: dict[str, Answer] = {}
        self.channels: dict[str, Channel] = {}
        self.status: dict[str, int] = {"not_found": 404, "invalid": 422, "not_yet": 504}

    def last(self, route: str) -> Asked:
        """The newest request of this route."""
        return next(asked for asked in reversed(self.asked) if asked.route == route)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        asked = await _asked(request)
        self.asked.append(asked)
        channel = self.channels.get(asked.path)
        if channel is not None and request.headers.get("Upgrade") == "websocket":
            return await self._speak(request, asked, channel)
        answer = self.answers.get(asked.route, NotFound(f"there is no {asked.path}"))
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if callable(answer):
            answer = answer(asked)
        return self._response(request, answer)

    def _response(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        if isinstance(answer, web.StreamResponse):
            return answer
        if isinstance(answer, bytes):
            return web.Response(body=answer, content_type="application/octet-stream")
        if answer is None:
            return web.Response(status=204)
        status = 200
        if isinstance(answer, QmpdError):
            status = self.status.get(answer.code, 409)
            answer = ErrorBody(code=answer.code, message=answer.message, details=answer.details)
        binary = request.headers.get("Accept") == "application/msgpack"
        body = msgspec.msgpack.encode(answer) if binary else msgspec.json.encode(answer)
        return web.Response(body=body, status=status, content_type="application/msgpack" if binary else "application/json")

    async def _speak(self, request: web.Request, asked: Asked, channel: Channel) -> web.StreamResponse:
        socket = web.WebSocketResponse(protocols=("qmpd.console.v1", "qmpd.events.msgpack"), timeout=1.0)
        await socket.prepare(request)
        try:
            await channel(socket, asked)
        except ConnectionError:
            return socket
        await socket.close()
        return socket


async def _asked(request: web.Request) -> Asked:
    raw = await request.read()
    body: object = None
    if raw:
        binary = request.content_type == "application/msgpack"
        body = msgspec.msgpack.decode(raw) if binary else msgspec.json.decode(raw)
    query = MultiDict(request.query)
    return Asked(
        method=request.method,
        path=request.path,
        query={key: query.getall(key) for key in query},
        headers=dict(request.headers),
        body=body,
    )


@asynccontextmanager
async def listening(standin: StandIn, path: Path) -> AsyncIterator[None]:
    """The stand-in answers at `path` while the block runs."""
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", standin.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.5, handle_signals=False)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(path)).start()
        yield
    finally:
        await runner.cleanup()


@contextmanager
def beside(standin: StandIn, path: Path) -> Iterator[StandIn]:
    """The same in a thread of its own, for tests that run qmpctl in this one."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    over = asyncio.Event()

    async def answer() -> None:
        async with listening(standin, path):
            ready.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(answer(),), name="standin")
    thread.start()
    try:
        assert ready.wait(PATIENCE_S)
        yield standin
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(PATIENCE_S)
        loop.close()


def machine(name: str = "lab", state: State = State.RUNNING, **changes: object) -> MachineView:
    """A machine as the daemon shows it."""
    view = MachineView(
        name=name,
        uuid="6fa459ea-ee8a-4ca4-894e-db77e160355e",
        board="riscv64-virt",
        arch="riscv64",
        machine="virt",
        revision=7,
        state=state,
        since="2026-01-02T03:04:05Z",
        cpus=1,
        memory_mib=256,
        accel="tcg",
    )
    return msgspec.structs.replace(view, **changes)


def machines(*views: MachineView, event: int = 40) -> MachineList:
    """The list of machines."""
    return MachineList(machines=views, event=event)


def stopped(name: str = "lab") -> StopView:
    """The answer to a stop."""
    return StopView(machine=machine(name, State.STOPPED), method="quit", clean=True)


@contextmanager
def for_qmpctl(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in that the next runs of qmpctl in this process talk to."""
    monkeypatch.setenv("QMPD_SOCKET", str(directory / "s"))
    monkeypatch.setattr("qmpd_api.client.JOB_LOOK_S", 0)
    with beside(StandIn(), directory / "s") as standin:
        yield standin


def documents_in(text: str) -> list[str]:
    """The JSON documents that stand one after the other in `text`."""
    decoder = json.JSONDecoder()
    found = []
    while text.strip():
        text = text.lstrip()
        _, end = decoder.raw_decode(text)
        found.append(text[:end])
        text = text[end:]
    return found
