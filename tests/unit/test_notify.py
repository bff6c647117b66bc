"""The service manager hears that the daemon is ready, that it turns, and that it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpd.notify import Manager, announced, taken_from

ROOT = Path(__file__).parents[2]
PID = 4711
#: Nothing here takes a fraction of this; a test that waits longer has failed.
PATIENCE_S = 60.0
#: So long that no ping but the first comes while a test runs.
LONG_S = 600.0
#: So short that a test sees many pings.
SHORT_S = 0.02


def bound(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    sock.bind(address)
    return sock


@pytest.fixture(params=["path", "abstract"])
def listening(request: pytest.FixtureRequest, short_directory: Path) -> Iterator[tuple[str, socket.socket]]:
    """What stands in NOTIFY_SOCKET, and the manager's end of it."""
    name = f"{short_directory}/n" if request.param == "path" else f"@qmpd-test-{os.getpid()}"
    with bound(name.replace("@", "\0")) as sock:
        yield name, sock


async def heard(sock: socket.socket) -> str:
    async with asyncio.timeout(PATIENCE_S):
        return (await asyncio.get_running_loop().sock_recv(sock, 4096)).decode()


async def test_the_manager_hears_of_the_beginning_and_of_the_end(listening: tuple[str, socket.socket]) -> None:
    address, sock = listening

    async with announced(Manager(address=address), "ready, with 3 machines running"):
        assert await heard(sock) == "READY=1\nSTATUS=ready, with 3 machines running"
    assert await heard(sock) == "STOPPING=1\nSTATUS=ending; machines go on"


async def test_an_error_is_an_end_too(listening: tuple[str, socket.socket]) -> None:
    address, sock = listening

    async def fail() -> None:
        async with announced(Manager(address=address), "ready"):
            await heard(sock)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert (await heard(sock)).startswith("STOPPING=1")


async def test_a_loop_that_turns_pings_the_watchdog(listening: tuple[str, socket.socket]) -> None:
    address, sock = listening

    async with announced(Manager(address=address, ping_s=SHORT_S), "ready"):
        await heard(sock)
        assert [await heard(sock) for _ in range(5)] == ["WATCHDOG=1"] * 5


async def test_a_blocked_loop_misses_its_pings(listening: tuple[str, socket.socket]) -> None:
    address, sock = listening

    async with announced(Manager(address=address, ping_s=SHORT_S), "ready"):
        await heard(sock)
        await heard(sock)
        emptied(sock)
        threading.Event().wait(10 * SHORT_S)  # blocks the loop: nothing else runs here
        assert emptied(sock) == 0
        assert await heard(sock) == "WATCHDOG=1"


def emptied(sock: socket.socket) -> int:
    """How many messages waited."""
    count = 0
    while True:
        try:
            sock.recv(4096)
        except BlockingIOError:
            return count
        count += 1


async def test_nobody_is_pinged_after_the_end(listening: tuple[str, socket.socket]) -> None:
    address, sock = listening

    async with announced(Manager(address=address, ping_s=LONG_S), "ready"):
        assert (await heard(sock)).startswith("READY=1")
        assert await heard(sock) == "WATCHDOG=1"
    assert (await heard(sock)).startswith("STOPPING=1")
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_manager_that_is_gone_ends_no_daemon(short_directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        async with announced(Manager(address=f"{short_directory}/nobody", ping_s=LONG_S), "ready"):
            pass
    assert vars(caplog.records[0])["told"] == "READY=1"


async def test_a_manager_that_comes_back_is_heard_again(short_directory: Path) -> None:
    address = f"{short_directory}/n"
    manager = Manager(address=address)
    with bound(address):
        await manager.tell("STATUS=one")
    await asyncio.to_thread(Path(address).unlink)
    with bound(address) as sock:
        await manager.tell("STATUS=two")
        assert await heard(sock) == "STATUS=two"


async def test_a_manager_that_does_not_read_is_not_waited_for(
    short_directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpd.notify.SEND_DEADLINE_S", 0.1)
    address = f"{short_directory}/n"
    manager = Manager(address=address)
    with bound(address), caplog.at_level(logging.WARNING):
        async with asyncio.timeout(PATIENCE_S):
            while not caplog.records:
                await manager.tell("WATCHDOG=1")
    assert vars(caplog.records[0])["error"] == "not in time"


async def test_without_a_manager_nothing_is_said() -> None:
    async with announced(Manager(), "ready"):
        pass
    async with announced(Manager(ping_s=LONG_S), "ready"):
        pass


async def test_the_daemon_tells_its_manager_when_it_answers_and_when_it_ends(short_directory: Path) -> None:
    notify, api = f"{short_directory}/n", f"{short_directory}/a"
    places = [f"--{name}={short_directory}/{name}" for name in ("state-dir", "run-dir", "cache-dir")]
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'api'}", "NOTIFY_SOCKET": notify, "WATCHDOG_USEC": "600000000"}
    with bound(notify) as sock:
        daemon = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "qmpd", "serve", f"--socket={api}", *places, env=environ, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            assert await heard(sock) == "READY=1\nSTATUS=ready, with 0 machines running"
            _, writer = await asyncio.open_unix_connection(api)
            writer.close()
            assert await heard(sock) == "WATCHDOG=1"
            daemon.terminate()
            assert (await heard(sock)).startswith("STOPPING=1")
            async with asyncio.timeout(PATIENCE_S):
                assert await daemon.wait() == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                daemon.kill()
            await daemon.wait()


def test_the_variables_are_taken_out_of_the_environment() -> None:
    environ = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(PID), "HOME": "/"}

    assert taken_from(environ, PID) == Manager(address="/run/n", ping_s=15.0)
    assert environ == {"HOME": "/"}


@pytest.mark.parametrize(
    "watchdog",
    [
        {},
        {"WATCHDOG_USEC": ""},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "-1"},
        {"WATCHDOG_USEC": "soon"},
        {"WATCHDOG_USEC": "\N{SUPERSCRIPT TWO}"},
        {"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(PID + 1)},
    ],
)
def test_a_watchdog_that_is_not_ours_or_none_is_not_pinged(watchdog: dict[str, str]) -> None:
    assert taken_from({"NOTIFY_SOCKET": "@n", **watchdog}, PID) == Manager(address="@n")


def test_a_watchdog_without_a_pid_means_us() -> None:
    assert taken_from({"WATCHDOG_USEC": "1500000"}, PID) == Manager(ping_s=0.75)


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative"])
def test_a_manager_of_an_unknown_kind_is_none(address: str, caplog: pytest.LogCaptureFixture) -> None:
    assert taken_from({"NOTIFY_SOCKET": address}, PID) == Manager()
    assert vars(caplog.records[0])["address"] == address
