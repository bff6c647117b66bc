"""How a real QEMU fails to start, hangs and ends, as its launcher sees it."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from qmpd.capture import stderr_tail, trim
from qmpd.errors import MonitorUnavailable, QemuDied, QemuSilent
from qmpd.process import ExitStatus, Identity, adopt
from tests.process.emulator import SPIN, Emulators, held, size

#: Pages that a file fills in part, and what the file system reserves ahead of a writer.
SLACK = 128 * 1024

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-device", "no-such-device"), "'no-such-device' is not a valid device model name"),
        (("-blockdev", "driver=file,node-name=d,filename=/absent"), "Could not open '/absent': No such file or directory"),
        (("-cpu", "z80"), "unable to find CPU model 'z80'"),
        (("-chardev", "socket,id=c,path=/" + "x" * 200), "UNIX socket path '/xxx"),
        (("-no-such-option",), "invalid option"),
    ],
    ids=["device", "file", "cpu", "socket path", "option"],
)
async def test_a_start_that_fails_ends_the_connection_at_once_and_says_why(
    emulators: Emulators, options: tuple[str, ...], words: str
) -> None:
    emulator = await emulators.start(*options, machine="q35")
    with pytest.raises((QemuDied, MonitorUnavailable)):
        async with emulator.session():
            pytest.fail("it does not start")
    assert await emulator.process.wait() == ExitStatus(code=1)
    assert words in await stderr_tail(emulator.stderr, start=emulator.process.stderr_start)


async def test_an_image_that_another_qemu_uses_is_refused_with_its_name(emulators: Emulators, directory: Path) -> None:
    image = directory / "disk"
    image.write_bytes(bytes(512))
    options: tuple[str, ...] = ("-blockdev", f"driver=file,node-name=f,filename={image}", "-blockdev", "driver=raw,node-name=d,file=f")
    options += ("-device", "virtio-blk-pci,drive=d")
    first = await emulators.start(*options, machine="q35")
    async with first.session():
        second = await emulators.start(*options, machine="q35")
        assert await second.process.wait() == ExitStatus(code=1)
    assert 'Failed to get "write" lock' in await stderr_tail(second.stderr)
    assert first.process.exit is None


async def test_a_start_that_hangs_before_the_greeting_is_silent_and_can_be_killed(emulators: Emulators) -> None:
    def stop_the_gate(identity: Identity) -> None:
        os.kill(identity.pid, signal.SIGSTOP)

    emulator = await emulators.start(record=stop_the_gate)
    with pytest.raises(QemuSilent, match="not ready in"):
        async with emulator.session(deadline_s=0.2):
            pytest.fail("it does not answer")
    assert emulator.process.exit is None
    emulator.process.signal(signal.SIGKILL)
    assert await emulator.process.wait() == ExitStatus(signal="SIGKILL")


async def test_a_qemu_killed_before_its_greeting_resets_the_waiting_client(emulators: Emulators) -> None:
    def stop_the_gate(identity: Identity) -> None:
        os.kill(identity.pid, signal.SIGSTOP)

    emulator = await emulators.start(record=stop_the_gate)
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(emulator.qmp)
        emulator.process.signal(signal.SIGKILL)
        await emulator.process.wait()
        with pytest.raises(ConnectionResetError):
            waiting.recv(1)
    with pytest.raises(MonitorUnavailable, match="no monitor"):
        async with emulator.session():
            pytest.fail("nobody is there")


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGSYS])
async def test_a_crash_is_told_by_its_signal_and_leaves_no_core(emulators: Emulators, number: signal.Signals) -> None:
    emulator = await emulators.start()
    async with emulator.session() as monitor:
        emulator.process.signal(number)
        assert await emulator.process.wait() == ExitStatus(signal=number.name)
        assert await monitor.wait_closed() in {"QEMU closed the connection", "the connection broke: [Errno 104] Connection reset by peer"}


async def test_sigterm_ends_it_cleanly(emulators: Emulators) -> None:
    emulator = await emulators.start()
    async with emulator.session() as monitor:
        emulator.process.signal(signal.SIGTERM)
        assert [event.name async for event in monitor.events()] == ["SHUTDOWN"]  # type: ignore[union-attr]
    assert await emulator.process.wait() == ExitStatus(code=0)
    assert "terminating on signal 15" in await stderr_tail(emulator.stderr)


async def test_a_qemu_that_was_launched_before_is_found_again(emulators: Emulators) -> None:
    emulator = await emulators.start()
    again = await adopt(emulator.process.identity)
    async with emulator.session() as monitor:
        assert not await again.binary_replaced()
        assert await monitor.execute("query-name") == {}
    again.close()


async def test_a_flood_on_standard_error_never_blocks_it_and_takes_little_disk(emulators: Emulators, directory: Path) -> None:
    (directory / "bios").write_bytes(SPIN)
    flood = ("-bios", str(directory / "bios"), "-d", "in_asm,int,exec,nochain,cpu")
    emulator = await emulators.start(*flood, machine="pc", halted=False)
    cap, written = 256 * 1024, 0
    async with emulator.session() as monitor:
        while written < 32 * cap:
            await monitor.execute("query-status")
            await trim(emulator.stderr, cap)
            taken = held(emulator.stderr)  # looked at first: it writes on meanwhile
            before, written = written, size(emulator.stderr)
            assert taken <= cap + (written - before) + SLACK
        await monitor.execute("stop")
    await trim(emulator.stderr, cap)
    assert held(emulator.stderr) <= cap + SLACK
    assert "EIP" in await stderr_tail(emulator.stderr)
