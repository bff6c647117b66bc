from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import sys
import termios
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from aiohttp import web

from qmpctl import terminal
from qmpctl.exits import Exit
from qmpd.errors import NotFound
from qmpd.lifecycle import State
from qmpd.spec import MachineSpec
from qmpd.views import DefinitionView, Event, EventPage, JobView, Progress
from qmpd_api.streams_client import ConsoleFrame
from tests.api.qmpctl_process import Piped, between_pipes, environment, on_screen
from tests.api.standin import Asked, StandIn, listening, machine, machines

DETACH = b"\x1d"


class Guest:
    """A console that prints `banner`, echoes what is typed in upper case, and ends the machine on `q`."""

    def __init__(self, banner: bytes = b"login: ") -> None:
        self.banner = banner
        self.typed = b""
        self.connections = 0

    async def __call__(self, socket: web.WebSocketResponse, asked: Asked) -> None:
        self.connections += 1
        offset = int(asked.query.get("since", ["0"])[0])
        await say(socket, ConsoleFrame(kind="hello", offset=offset))
        if offset == 0:
            await say(socket, ConsoleFrame(kind="output", offset=0, data=self.banner))
        async for message in socket:
            typed = msgspec.msgpack.decode(message.data, type=ConsoleFrame).data
            self.typed += typed
            if typed == b"q":
                await say(socket, ConsoleFrame(kind="ended", offset=0))
                return
            await say(socket, ConsoleFrame(kind="output", offset=1000, data=typed.upper()))


async def say(socket: web.WebSocketResponse, frame: ConsoleFrame) -> None:
    await socket.send_bytes(msgspec.msgpack.encode(frame))


@pytest.fixture
def path(short_directory: Path) -> Path:
    return short_directory / "s"


@pytest.fixture
async def daemon(path: Path) -> AsyncIterator[StandIn]:
    standin = StandIn()
    standin.answers["GET /v1/machines/lab"] = machine()
    async with listening(standin, path):
        yield standin


async def test_the_console_is_raw_until_the_detach_key_puts_it_back(path: Path, daemon: StandIn) -> None:
    guest = daemon.channels["/v1/machines/lab/console"] = Guest()
    async with on_screen(path, "console", "lab") as screen:
        await screen.until(rb"qmpctl: console of lab, Ctrl-\] detaches")
        await screen.until(b"login: ")
        assert screen.raw
        screen.press(b"root\x03\x1a\x04")  # Ctrl-C, Ctrl-Z and Ctrl-D are the guest's
        await screen.until(re.escape(b"ROOT\x03\x1a\x04"))
        screen.press(b"x" + DETACH + b"never typed")
        await screen.until(rb"detached from lab")
        assert await screen.ended() == Exit.OK
        assert termios.tcgetattr(screen.slave) == screen.before
    assert guest.typed == b"root\x03\x1a\x04x"


async def test_what_a_guest_did_to_the_terminal_is_undone(path: Path, daemon: StandIn) -> None:
    daemon.channels["/v1/machines/lab/console"] = Guest(b"\x1b[?25l\x1b[31mred$ ")
    async with on_screen(path, "console", "lab") as screen:
        await screen.until(rb"red\$ ")
        screen.press(DETACH)
        await screen.until(re.escape(terminal.RESET))
        assert await screen.ended() == Exit.OK


async def test_the_terminal_is_put_back_when_the_machine_ends(path: Path, daemon: StandIn) -> None:
    daemon.channels["/v1/machines/lab/console"] = Guest()
    async with on_screen(path, "console", "lab") as screen:
        await screen.until(b"login: ")
        screen.press(b"q")
        await screen.until(b"lab has ended")
        assert await screen.ended() == Exit.OK
        assert termios.tcgetattr(screen.slave) == screen.before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
async def test_the_terminal_is_put_back_when_a_signal_ends_qmpctl(path: Path, daemon: StandIn, number: int, code: int) -> None:
    daemon.channels["/v1/machines/lab/console"] = Guest()
    async with on_screen(path, "console", "lab") as screen:
        await screen.until(b"login: ")
        assert screen.raw
        screen.process.send_signal(number)
        assert await screen.ended() == code
        assert termios.tcgetattr(screen.slave) == screen.before


async def test_the_terminal_is_put_back_when_the_console_fails(path: Path, daemon: StandIn) -> None:
    async def fail(socket: web.WebSocketResponse, _: Asked) -> None:
        await say(socket, ConsoleFrame(kind="output", data=b"login: "))
        await socket.receive()
        await socket.close(code=1011, message=b"qemu_died: QEMU is gone")

    daemon.channels["/v1/machines/lab/console"] = fail
    async with on_screen(path, "console", "lab") as screen:
        await screen.until(b"login: ")
        screen.press(b"x")
        await screen.until(b"qmpctl: QEMU is gone")
        assert await screen.ended() == Exit.QEMU
        assert termios.tcgetattr(screen.slave) == screen.before


async def test_a_misspelt_name_leaves_the_terminal_alone(path: Path, daemon: StandIn) -> None:
    async with on_screen(path, "console", "lad") as screen:
        await screen.until(rb"qmpctl: there is no /v1/machines/lad")
        assert await screen.ended() == Exit.NOT_FOUND


async def test_another_detach_key_leaves_the_usual_one_to_the_guest(path: Path, daemon: StandIn) -> None:
    guest = daemon.channels["/v1/machines/lab/console"] = Guest()
    async with on_screen(path, "console", "lab", "--escape", "^a") as screen:
        await screen.until(b"Ctrl-A detaches.*login: ")
        screen.press(DETACH)
        await screen.until(DETACH)
        screen.press(b"\x01")
        assert await screen.ended() == Exit.OK
    assert guest.typed == DETACH


async def test_the_console_goes_on_where_it_was_after_the_daemon_restarted(path: Path) -> None:
    standin = StandIn()
    standin.answers["GET /v1/machines/lab"] = machine()
    guest = standin.channels["/v1/machines/lab/console"] = Guest()
    async with AsyncExitStack() as first_life:
        await first_life.enter_async_context(listening(standin, path))
        async with on_screen(path, "console", "lab") as screen:
            await screen.until(b"login: ")
            await first_life.aclose()
            await screen.until(b"connecting again")
            async with listening(standin, path):
                await screen.until(b"connected again")
                screen.press(b"a")
                await screen.until(b"A")
                screen.press(DETACH)
                assert await screen.ended() == Exit.OK
    assert standin.last("GET /v1/machines/lab/console").query == {"since": ["7"]}
    assert guest.typed == b"a"


@pytest.fixture
def piped(path: Path) -> Piped:
    return partial(between_pipes, path)


async def test_a_console_between_pipes_types_everything_and_shows_everything(daemon: StandIn, piped: Piped) -> None:
    banner = bytes(range(256)) * 1000
    typed = b"a" + DETACH + b"\x00" * 10_000
    seen = b""

    async def guest(socket: web.WebSocketResponse, _: Asked) -> None:
        nonlocal seen
        await say(socket, ConsoleFrame(kind="output", data=banner))
        while len(seen) < len(typed):
            message = await socket.receive()
            seen += msgspec.msgpack.decode(message.data, type=ConsoleFrame).data
        await say(socket, ConsoleFrame(kind="ended"))

    daemon.channels["/v1/machines/lab/console"] = guest
    assert await piped("console", "lab", stdin=typed) == (Exit.OK, banner, b"")
    assert seen == typed


async def test_the_end_of_stdin_does_not_end_the_console(daemon: StandIn, piped: Piped) -> None:
    async def guest(socket: web.WebSocketResponse, _: Asked) -> None:
        await say(socket, ConsoleFrame(kind="output", data=b"later"))
        await say(socket, ConsoleFrame(kind="ended"))

    daemon.channels["/v1/machines/lab/console"] = guest
    assert await piped("console", "lab") == (Exit.OK, b"later", b"")


async def test_a_reader_that_has_seen_enough_is_no_error(path: Path, daemon: StandIn) -> None:
    daemon.answers["GET /v1/machines"] = machines(*(machine(f"m{number}") for number in range(2000)))
    command = f"{sys.executable} -m qmpctl list | head -1"
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_shell(command, stdout=pipe, stderr=pipe, env=environment(path))
    out, err = await process.communicate()
    assert out.startswith(b"NAME")
    assert err == b""


async def test_tables_are_coloured_on_a_terminal_only_and_not_against_no_color(path: Path, daemon: StandIn, piped: Piped) -> None:
    daemon.answers["GET /v1/machines"] = machines(machine(state=State.CRASHED, console_line="evil \x1b[5m"))
    async with on_screen(path, "list") as screen:
        shown = await screen.until(rb"evil \\x1b\[5m")
        assert b"\x1b[1;31mcrashed" in shown
        assert b"\x1b[5m" not in shown
        assert await screen.ended() == Exit.OK
    async with on_screen(path, "list", NO_COLOR="1") as screen:
        shown = await screen.until(rb"crashed")
        assert b"31m" not in shown
        assert await screen.ended() == Exit.OK
    assert b"\x1b" not in (await piped("list"))[1]


async def test_a_watched_list_shows_changes_as_they_happen(path: Path, daemon: StandIn) -> None:
    daemon.answers["GET /v1/events"] = NotFound("events are not the point here")
    daemon.answers["GET /v1/machines"] = [
        machines(machine()),
        machines(machine(state=State.PAUSED), machine("new")),
        machines(machine("new")),
    ]
    async with on_screen(path, "list", "--watch") as screen:
        await screen.until(rb"lab.*running")
        await screen.until(rb"lab.*paused.*new")


async def test_a_watched_list_between_pipes_is_lines(daemon: StandIn, piped: Piped) -> None:
    daemon.answers["GET /v1/events"] = NotFound("the stream breaks off")
    daemon.answers["GET /v1/machines"] = [machines(machine()), machines(machine(state=State.PAUSED), machine("new"))]
    code, out, _ = await piped("list", "--watch")
    assert code == Exit.NOT_FOUND
    lines = out.decode().splitlines()
    assert lines[1].split()[:2] == ["lab", "running"]
    assert lines[2:] == ["lab paused", "new running"]


async def test_a_watched_list_as_json_is_one_document_per_change(path: Path, daemon: StandIn) -> None:
    daemon.answers["GET /v1/events"] = EventPage(events=(), first=1, last=0)
    daemon.channels["/v1/events"] = silent
    first, second = machines(machine()), machines(machine(state=State.PAUSED))
    daemon.answers["GET /v1/machines"] = [first, second]
    async with on_screen(path, "list", "--watch", "--json") as screen:
        assert b'"state":"running"' in await screen.until(rb"\n")
        assert b'"state":"paused"' in await screen.until(rb"\n")
        screen.process.send_signal(signal.SIGINT)
        assert await screen.ended() == 130


async def test_a_watched_list_waits_for_a_daemon_that_restarts(path: Path) -> None:
    standin = StandIn()
    standin.answers |= {"GET /v1/machines": machines(machine()), "GET /v1/events": EventPage(events=(), first=1, last=0)}
    standin.channels["/v1/events"] = silent
    async with AsyncExitStack() as first_life:
        await first_life.enter_async_context(listening(standin, path))
        async with on_screen(path, "list", "--watch") as screen:
            await screen.until(b"lab.*running")
            while not any(asked.headers.get("Upgrade") for asked in standin.asked):
                await screen.until(b"lab")
            await first_life.aclose()
            standin.answers["GET /v1/machines"] = machines(machine(state=State.PAUSED))
            async with listening(standin, path):
                await screen.until(b"lab.*paused")


async def silent(socket: web.WebSocketResponse, _: Asked) -> None:
    async for _message in socket:
        pass


async def test_followed_events_are_printed_as_they_come_with_what_is_gone(path: Path, daemon: StandIn) -> None:
    def event(number: int) -> Event:
        return Event(number=number, at="t", kind="machine.state", machine="lab", data={"state": "running"})

    async def live(socket: web.WebSocketResponse, asked: Asked) -> None:
        await socket.send_bytes(msgspec.msgpack.encode(event(8)))
        await silent(socket, asked)

    missed = EventPage(events=(event(7),), first=7, last=7, gap=True)
    daemon.answers["GET /v1/events"] = [missed, EventPage(events=(), first=7, last=7)]
    daemon.channels["/v1/events"] = live
    async with on_screen(path, "events", "-f", "--since", "3") as screen:
        shown = await screen.until(rb"\n +8 .*\n")
        assert b"events 4 to 6 are no longer kept" in shown
        assert b"7  t  lab  machine.state" in shown
        screen.process.send_signal(signal.SIGTERM)
        assert await screen.ended() == 143


async def test_a_job_has_a_progress_bar_on_a_terminal(path: Path, daemon: StandIn) -> None:
    def job(state: Literal["running", "succeeded"], done: float) -> JobView:
        progress = Progress(phase="waiting", done=done, total=4, unit="s")
        return JobView(id="j1", kind="shutdown", state=state, created_at="t", progress=progress)

    daemon.answers["GET /v1/jobs/j1"] = [job("running", 1), job("running", 2), job("running", 3), job("succeeded", 4)]
    async with on_screen(path, "job", "j1", "--wait") as screen:
        await screen.until(rb"waiting 3/4 s.*succeeded")
        assert await screen.ended() == Exit.OK


async def test_what_was_refused_can_be_edited_again(path: Path, daemon: StandIn, tmp_path: Path) -> None:
    spec = MachineSpec(name="lab", board="b", memory_mib=256)
    daemon.answers |= {
        "GET /v1/machines/lab/definition": DefinitionView(spec=spec, revision=7, created_at="t", changed_at="t"),
        "PUT /v1/machines/lab": machine(revision=8),
    }
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nif grep -q 256 "$1"; then sed -i s/256/-1/ "$1"; else sed -i s/-1/512/ "$1"; fi\n')
    editor.chmod(0o700)
    async with on_screen(path, "edit", "lab", VISUAL=str(editor)) as screen:
        await screen.until(rb"memory_mib: .*Edit again\?")
        screen.press(b"y\n")
        await screen.until(rb"lab: replaced, now revision 8")
        assert await screen.ended() == Exit.OK
    assert daemon.last("PUT /v1/machines/lab").body == {"name": "lab", "board": "b", "memory_mib": 512}


def test_a_descriptor_that_is_no_terminal_is_left_alone(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file, terminal.raw(file.fileno()) as is_terminal:
        assert not is_terminal


async def test_regular_files_and_dev_null_are_always_ready(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    descriptor = os.open(tmp_path / "x", os.O_RDWR)
    try:
        assert await terminal.read(descriptor) == b"abc"
        await terminal.write(descriptor, b"x" * 10_000)
        assert await terminal.read(descriptor) == b""
    finally:
        os.close(descriptor)
    assert (tmp_path / "x").read_bytes() == b"abc" + b"x" * 10_000


async def test_a_terminal_that_was_closed_is_the_end_of_the_file() -> None:
    master, slave = pty.openpty()
    os.close(slave)
    try:
        assert await terminal.read(master) == b""
    finally:
        os.close(master)


async def test_a_slow_reader_does_not_block_the_loop() -> None:
    reading, writing = os.pipe()
    try:
        data = os.urandom(1 << 20)
        writer = asyncio.create_task(terminal.write(writing, data), name="writer")
        received = b""
        while len(received) < len(data):
            received += await terminal.read(reading)
        await writer
        assert received == data
    finally:
        os.close(reading)
        os.close(writing)
