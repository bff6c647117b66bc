"""What a new daemon finds when the old one died badly: damaged records, strangers under known numbers, stolen sockets, silent QEMUs."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from qmpd.record import FORMAT, RECORD_NAME, LaunchRecord, read_record, write_record
from tests.faults.witness import AT_REST, Bench, document_of, launched, pid_of, request, serving, swept, told, until
from tests.guests.build import Guest
from tests.process.test_serve import PATIENCE_S, ended

pytestmark = pytest.mark.qemu

GUEST = "x86_64-q35-quiet"


def later(data: bytes) -> bytes:
    """The record as a later daemon might write it."""
    record = msgspec.msgpack.decode(data, type=LaunchRecord)
    return msgspec.msgpack.encode(msgspec.structs.replace(record, format=FORMAT + 1))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut-short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "garbage": lambda data: b"\xc1" * len(data),
    "another-type": lambda data: msgspec.msgpack.encode([1, 2, 3]),
    "later": later,
    "deep": lambda data: b"\x91" * 100_000,
}


@pytest.fixture
async def bench(short_directory: Path) -> AsyncIterator[Bench]:
    made = Bench(short_directory)
    yield made
    for name in ("one", "two", "three", "four", *DAMAGE):
        await swept(made, name)


async def test_damaged_launch_records_destroy_nothing_and_keep_nobody_waiting(bench: Bench, guests: dict[str, Guest]) -> None:
    pids = await launched(bench, guests[GUEST], "one", *DAMAGE)
    for name, damage in DAMAGE.items():
        record = bench.running_dir(name) / RECORD_NAME
        record.write_bytes(damage(record.read_bytes()))
    async with serving(bench) as daemon:
        await daemon.ready()
        assert await pid_of(bench, "one") == pids["one"]
        for name in DAMAGE:
            assert (await told(bench, "GET", f"/machines/{name}"))["state"] not in AT_REST
            for method, path in (("POST", f"/machines/{name}/start"), ("DELETE", f"/machines/{name}")):
                refused = await request(bench, method, path)
                assert refused is not None
                assert refused.status == 409, refused
            assert await asyncio.to_thread(bench.processes, name) == [pids[name]]
        for name in DAMAGE:
            await ended(pids[name])
            await until(bench, name, *AT_REST)
        assert await pid_of(bench, "one") == pids["one"]
        assert await daemon.stop() == 0
        assert "Traceback" not in daemon.log


async def test_nobody_halts_a_guest_that_is_about_to_be_set_going_by_the_daemon(bench: Bench, guests: dict[str, Guest]) -> None:
    """`stop` of a guest that has not begun is answered by QEMU, and undone by the `cont` that follows."""
    stop = {"execute": "stop"}
    async with serving(bench, "guest-cont:hang") as daemon:
        await daemon.ready()
        await told(bench, "POST", "/machines", document_of(guests[GUEST], "one"))
        starting = asyncio.create_task(request(bench, "POST", "/machines/one/start"), name="starting")
        async with asyncio.timeout(PATIENCE_S):
            while (asked := await request(bench, "POST", "/machines/one/qmp", {"execute": "query-status"})) is None or not asked.good:
                await asyncio.sleep(0.05)
        refused = await request(bench, "POST", "/machines/one/qmp", stop)
        assert refused is not None
        assert (refused.status, refused.body["code"]) == (503, "monitor_unavailable"), refused
        await daemon.stop(signal.SIGKILL)
        await starting
    async with serving(bench, "adopted-cont:hang") as daemon:
        await daemon.ready()
        await until(bench, "one", "unreachable")
        for path, body in (("qmp", stop), ("pause", None)):
            refused = await request(bench, "POST", f"/machines/one/{path}", body)
            assert refused is not None
            assert not refused.good, refused
        await daemon.stop(signal.SIGKILL)
    async with serving(bench) as daemon:
        await daemon.ready()
        await until(bench, "one", "running")
        assert (await told(bench, "POST", "/machines/one/pause"))["state"] == "paused"


@contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is nobody's machine."""
    with subprocess.Popen(["/bin/sleep", "600"]) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_a_stranger_under_a_machines_number_is_never_touched(bench: Bench, guests: dict[str, Guest]) -> None:
    for pid in (await launched(bench, guests[GUEST], "one", "two")).values():
        await ended(pid)
    with sleeper() as stranger:
        for name in ("one", "two"):
            directory = str(bench.running_dir(name))
            record = read_record(directory)
            start = int(Path(f"/proc/{stranger.pid}/stat").read_bytes().rpartition(b")")[2].split()[19])  # noqa: ASYNC240
            # The first record's number was given to somebody else; the second one is of another boot, whoever has the number now.
            identity = msgspec.structs.replace(
                record.identity,
                pid=stranger.pid,
                **({} if name == "one" else {"start_time": start, "boot_id": "00000000-0000-4000-8000-000000000000"}),
            )
            write_record(directory, msgspec.structs.replace(record, identity=identity))
        async with serving(bench) as daemon:
            await daemon.ready()
            endings = {}
            for name in ("one", "two"):
                machine = await told(bench, "GET", f"/machines/{name}")
                assert isinstance(machine["exit"], dict)
                endings[name] = (machine["state"], machine["exit"]["reason"])
                assert (await told(bench, "POST", f"/machines/{name}/kill"))["method"] == "already-stopped"
            assert endings == {"one": ("crashed", "ended while no daemon ran"), "two": ("stopped", "the host was restarted")}
            await told(bench, "POST", "/machines/one/start")
            assert await pid_of(bench, "one") != stranger.pid
            await told(bench, "POST", "/machines/one/kill")
            assert stranger.poll() is None
            assert await daemon.stop() == 0


async def test_a_qemu_that_is_stopped_while_its_daemon_is_replaced_keeps_nobody_waiting(bench: Bench, guests: dict[str, Guest]) -> None:
    pids = await launched(bench, guests[GUEST], "one", "two")
    os.kill(pids["one"], signal.SIGSTOP)
    try:
        async with serving(bench) as daemon:
            await daemon.ready()
            assert await pid_of(bench, "two") == pids["two"]
            await told(bench, "POST", "/machines/two/pause")
            await told(bench, "POST", "/machines/two/resume")
            machine = await until(bench, "one", "unresponsive", "unreachable")
            assert machine["pid"] == pids["one"]
            listed = (await told(bench, "GET", "/machines"))["machines"]
            assert isinstance(listed, list)
            assert [view["pid"] for view in listed] == [pids["one"], pids["two"]]
            os.kill(pids["one"], signal.SIGCONT)
            assert await pid_of(bench, "one") == pids["one"]
            assert (await told(bench, "POST", "/machines/one/stop"))["method"] == "quit"
            await told(bench, "POST", "/machines/two/kill")
            assert await daemon.stop() == 0
    finally:
        if Path(f"/proc/{pids['one']}").exists():  # noqa: ASYNC240
            os.kill(pids["one"], signal.SIGCONT)


#: Takes a path away from whoever listens there, and says what it is told.
THIEF = """
import os, socket
path = os.environ["STOLEN"]  # not on the command line, by which a machine's processes are found
os.path.exists(path) and os.unlink(path)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(path)
    listener.listen(8)
    print("listening", flush=True)
    while True:
        connection, _ = listener.accept()
        connection.settimeout(30)
        print("heard", connection.recv(100), flush=True)
        connection.close()
"""


async def test_a_socket_that_somebody_took_over_is_told_nothing(bench: Bench, guests: dict[str, Guest]) -> None:
    pids = await launched(bench, guests[GUEST], "one")
    path = read_record(str(bench.running_dir("one"))).sockets["qmp"]
    thief = await asyncio.create_subprocess_exec(
        sys.executable, "-c", THIEF, env={**os.environ, "STOLEN": path}, stdout=asyncio.subprocess.PIPE
    )
    assert thief.stdout is not None
    try:
        assert await thief.stdout.readline() == b"listening\n"
        async with serving(bench) as daemon:
            await daemon.ready()
            async with asyncio.timeout(PATIENCE_S):
                assert await thief.stdout.readline() == b"heard b''\n"
            machine = await told(bench, "GET", "/machines/one")
            assert (machine["pid"], machine["state"] in AT_REST) == (pids["one"], False)
            assert (await told(bench, "POST", "/machines/one/kill"))["method"] == "sigkill"
            assert await asyncio.to_thread(bench.processes) == []
            assert await daemon.stop() == 0
    finally:
        thief.kill()
        await thief.wait()


async def test_a_daemon_that_is_told_twice_to_end_in_the_middle_of_its_work_ends_once(bench: Bench, guests: dict[str, Guest]) -> None:
    names = ("one", "two", "three", "four")
    async with serving(bench) as daemon:
        await daemon.ready()
        for name in names:
            await told(bench, "POST", "/machines", document_of(guests[GUEST], name))
        starting = [asyncio.create_task(request(bench, "POST", f"/machines/{name}/start"), name=name) for name in names]
        async with asyncio.timeout(PATIENCE_S):
            while not any([await asyncio.to_thread(bench.processes, name) for name in names]):
                await asyncio.sleep(0)
        daemon.process.send_signal(signal.SIGTERM)
        assert await daemon.stop(signal.SIGTERM) == 0
        replies = dict(zip(names, await asyncio.gather(*starting), strict=True))
        assert "Traceback" not in daemon.log
    async with serving(bench) as daemon:
        await daemon.ready()
        for name in names:
            machine = await until(bench, name, "running", *AT_REST)
            reply = replies[name]
            if reply is not None and reply.good:
                assert machine["state"] == "running"
            runs = machine["state"] == "running"
            async with asyncio.timeout(PATIENCE_S):
                while len(found := await asyncio.to_thread(bench.processes, name)) > runs:
                    await asyncio.sleep(0.05)  # a gate whose daemon ended reads the end of its pipe
            assert found == ([machine["pid"]] if runs else [])
            await told(bench, "POST", f"/machines/{name}/kill")
        assert await daemon.stop() == 0
