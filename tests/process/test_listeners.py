from __future__ import annotations

import asyncio
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qmpd.errors import AlreadyExists, Busy, Invalid, LaunchFailed
from qmpd.listeners import PATH_LIMIT, bound_listeners
from tests.process.emulator import Emulators, names, quiet


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def client(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


def peer_pid(sock: socket.socket) -> int:
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    assert isinstance(pid, int)
    return pid


@pytest.mark.usefixtures("open_umask")
async def test_a_socket_is_private_whatever_the_umask(directory: Path) -> None:
    async with bound_listeners({"qmp": str(directory / "qmp")}):
        assert stat.S_IMODE((directory / "qmp").stat().st_mode) == 0o600


async def test_sockets_carry_the_names_of_their_paths_and_are_not_inherited_by_accident(directory: Path) -> None:
    async with bound_listeners({name: str(directory / name) for name in ("qmp", "serial0")}) as listeners:
        assert {name: sock.getsockname() for name, sock in listeners.items()} == {
            name: str(directory / name) for name in ("qmp", "serial0")
        }
        assert not any(sock.get_inheritable() for sock in listeners.values())


async def test_a_client_can_connect_before_anybody_accepts(directory: Path) -> None:
    async with bound_listeners({"qmp": str(directory / "qmp")}):
        client(str(directory / "qmp")).close()


async def test_leaving_closes_the_sockets_and_keeps_the_paths(directory: Path) -> None:
    async with bound_listeners({"qmp": str(directory / "qmp")}) as listeners:
        sock = listeners["qmp"]
    assert sock.fileno() == -1
    assert (directory / "qmp").is_socket()


async def test_a_waiting_client_is_reset_when_the_last_owner_of_the_listener_goes(directory: Path) -> None:
    async with bound_listeners({"qmp": str(directory / "qmp")}):
        waiting = client(str(directory / "qmp"))
    with waiting, pytest.raises(ConnectionResetError):
        waiting.recv(1)


async def test_what_a_dead_owner_left_is_replaced(directory: Path) -> None:
    path = str(directory / "qmp")
    async with bound_listeners({"qmp": path}):
        pass
    async with bound_listeners({"qmp": path}):
        client(path).close()


async def test_a_path_somebody_listens_at_is_refused_and_nothing_is_bound(directory: Path) -> None:
    paths = {"serial0": str(directory / "serial0"), "qmp": str(directory / "qmp")}
    async with bound_listeners({"qmp": paths["qmp"]}):
        with pytest.raises(AlreadyExists, match="somebody listens"):
            async with bound_listeners(paths):
                pytest.fail("bound twice")
        client(paths["qmp"]).close()
    assert not (directory / "serial0").exists()


async def test_a_path_whose_owner_has_a_full_backlog_is_refused(directory: Path) -> None:
    path = str(directory / "qmp")
    with socket.socket(socket.AF_UNIX) as owner:
        owner.bind(path)
        owner.listen(0)
        with client(path), pytest.raises(AlreadyExists):
            async with bound_listeners({"qmp": path}):
                pytest.fail("bound twice")


async def test_a_file_that_is_not_a_socket_is_refused_and_left_alone(directory: Path) -> None:
    (directory / "qmp").write_text("precious")
    with pytest.raises(AlreadyExists, match="not a socket"):
        async with bound_listeners({"qmp": str(directory / "qmp")}):
            pytest.fail("bound over a file")
    assert (directory / "qmp").read_text() == "precious"


async def test_the_longest_path_the_kernel_takes_is_bound_and_a_longer_one_names_the_limit(directory: Path) -> None:
    longest = str(directory / ("x" * (PATH_LIMIT - len(str(directory)) - 1)))
    async with bound_listeners({"qmp": longest}):
        client(longest).close()
    with pytest.raises(Invalid, match="108 bytes, the kernel's limit is 107"):
        async with bound_listeners({"qmp": longest + "x"}):
            pytest.fail("bound a path that is cut off")


async def test_a_missing_directory_is_named(directory: Path) -> None:
    with pytest.raises(LaunchFailed, match="absent/qmp"):
        async with bound_listeners({"qmp": str(directory / "absent" / "qmp")}):
            pytest.fail("bound nowhere")


async def test_without_descriptors_the_host_is_busy_and_nothing_is_left(directory: Path, few_descriptors: Callable[[int], None]) -> None:
    few_descriptors(1)
    with pytest.raises(Busy, match="Too many open files"):
        async with bound_listeners({name: str(directory / name) for name in ("qmp", "serial0", "vnc")}):
            pytest.fail("bound without descriptors")
    few_descriptors(20)
    assert names(directory) == set()


async def test_a_caller_that_goes_away_while_binding_leaves_nothing_open(directory: Path) -> None:
    async def bind() -> None:
        async with bound_listeners({"qmp": str(directory / "qmp")}):
            pytest.fail("was cancelled")

    task = asyncio.create_task(bind(), name="binding")
    await asyncio.sleep(0)  # it is in the thread now
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await quiet()
    assert names(directory) == set()


async def test_the_peer_of_a_socket_is_whoever_called_listen_last_when_the_client_connected(emulators: Emulators) -> None:
    emulator = await emulators.start()
    async with emulator.session():
        # QEMU is up, and has called listen(2) again on the socket that it inherited.
        with client(emulator.qmp) as late:
            assert peer_pid(late) == emulator.process.identity.pid


async def test_before_qemu_runs_the_peer_is_ourselves(directory: Path) -> None:
    async with bound_listeners({"qmp": str(directory / "qmp")}):
        with client(str(directory / "qmp")) as early:
            assert peer_pid(early) == os.getpid()
