"""The listener: who may connect, what is replaced, and what is left alone."""

from __future__ import annotations

import asyncio
import grp
import os
import socket
import stat
from pathlib import Path

import pytest

from qmpd.errors import AlreadyExists, HostError, Invalid
from qmpd_api.application import create
from qmpd_api.limits import Limits
from qmpd_api.server import answering, passed_sockets, serve
from tests.api.bench import Bench
from tests.api.wire import PATIENCE_S, answer, ask, connected, ended, request


async def test_only_the_owner_may_connect(bench: Bench, short_directory: Path) -> None:
    path = short_directory / "api.sock"
    async with serve(create(bench.as_service()), str(path)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


async def test_a_group_may_connect_if_it_is_named(bench: Bench, short_directory: Path) -> None:
    path = short_directory / "api.sock"
    group = grp.getgrgid(os.getgid()).gr_name
    async with serve(create(bench.as_service()), str(path), group=group):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert path.stat().st_gid == os.getgid()


async def test_a_group_that_is_not_there_is_named_and_nothing_is_left(bench: Bench, short_directory: Path) -> None:
    path = short_directory / "api.sock"
    with pytest.raises(HostError, match="no-such-group"):
        async with serve(create(bench.as_service()), str(path), group="no-such-group"):
            pass
    assert not path.exists()


async def test_the_socket_of_a_dead_daemon_is_replaced(bench: Bench, short_directory: Path) -> None:
    path = str(short_directory / "api.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    async with serve(create(bench.as_service()), path):
        assert (await ask(path, "GET", "/v1/version")).status == 200


async def test_the_socket_of_a_living_daemon_is_left_alone(bench: Bench, socket_path: str) -> None:
    with pytest.raises(AlreadyExists, match="listens"):
        async with serve(create(bench.as_service()), socket_path):
            pass
    assert (await ask(socket_path, "GET", "/v1/version")).status == 200


async def test_a_file_is_left_alone(bench: Bench, short_directory: Path) -> None:
    path = short_directory / "api.sock"
    path.write_text("mine")
    with pytest.raises(AlreadyExists):
        async with serve(create(bench.as_service()), str(path)):
            pass
    assert path.read_text() == "mine"


async def test_a_path_that_is_too_long_is_invalid(bench: Bench, short_directory: Path) -> None:
    with pytest.raises(Invalid, match="limit"):
        async with serve(create(bench.as_service()), str(short_directory / ("x" * 120))):
            pass


async def test_a_socket_that_somebody_else_put_there_is_not_removed(bench: Bench, short_directory: Path) -> None:
    path = short_directory / "api.sock"
    async with serve(create(bench.as_service()), str(path)):
        path.rename(short_directory / "ours.sock")
        path.write_text("theirs")
    assert path.read_text() == "theirs"


async def test_a_request_under_way_is_answered_when_the_daemon_ends(bench: Bench, short_directory: Path) -> None:
    bench.gate.clear()
    path = str(short_directory / "api.sock")
    server = serve(create(bench.as_service()), path)
    await server.__aenter__()
    async with connected(path) as (reader, writer):
        writer.write(request("POST", "/v1/machines", b'{"name":"lab","board":"riscv64-virt"}'))
        await until_called(bench)
        asyncio.get_running_loop().call_later(0.05, bench.gate.set)
        await server.__aexit__(None, None, None)
        assert (await answer(reader)).status == 201


async def test_a_request_that_never_ends_does_not_keep_the_daemon(bench: Bench, short_directory: Path) -> None:
    bench.gate.clear()
    path = str(short_directory / "api.sock")
    server = serve(create(bench.as_service(), Limits(shutdown_s=0.2)), path)
    await server.__aenter__()
    async with connected(path) as (reader, writer):
        writer.write(request("POST", "/v1/machines", b'{"name":"lab","board":"riscv64-virt"}'))
        await until_called(bench)
        await server.__aexit__(None, None, None)
        assert await ended(reader) == b""


async def until_called(bench: Bench) -> None:
    """Returns when a request has reached the service."""
    async with asyncio.timeout(PATIENCE_S):
        while not bench.calls:
            await asyncio.sleep(0.005)


def passed(pid: int, count: int) -> dict[str, str]:
    return {"LISTEN_PID": str(pid), "LISTEN_FDS": str(count)}


def test_nothing_is_taken_that_was_passed_to_another_process() -> None:
    assert passed_sockets({}, 10) == []
    assert passed_sockets(passed(11, 1), 10) == []


async def test_a_socket_that_systemd_passed_is_answered(bench: Bench, short_directory: Path) -> None:
    path = short_directory / "api.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    os.set_inheritable(listener.fileno(), True)
    (taken,) = passed_sockets(passed(10, 1), 10, listener.detach())
    assert not taken.get_inheritable()
    async with answering(create(bench.as_service()), [taken]):
        assert (await ask(str(path), "GET", "/v1/version")).status == 200
    assert path.exists(), "systemd owns it"


def test_a_tcp_socket_is_refused() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        with pytest.raises(HostError, match="Unix"):
            passed_sockets(passed(10, 1), 10, os.dup(listener.fileno()))
