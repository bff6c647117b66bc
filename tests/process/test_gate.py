from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import pytest

from qmpd import process as process_module
from qmpd.capture import stderr_tail
from qmpd.errors import Busy, LaunchFailed
from qmpd.listeners import bound_listeners
from qmpd.process import ExitStatus, Gate, Identity, NotOurs, adopt, gate, launch
from tests.process.conftest import Starter
from tests.process.emulator import PATIENCE_S, children, program_of, quiet, unrecorded

BOOT_ID = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
ROOT = Path(__file__).parents[2]

#: A daemon that launches a program and dies before the record is made, at a point its parent chooses.
DYING_DAEMON = """
import asyncio, sys, time
from functools import partial
import msgspec
from qmpd.process import gate, launch

def record(identity):
    print(msgspec.json.encode(identity).decode(), flush=True)
    time.sleep(1000)

asyncio.run(launch(partial(gate, sys.argv[2:], inherited=(), cwd="/", stderr=sys.argv[1], record=record)))
"""


def before(
    directory: Path, argv: Sequence[str], record: Callable[[Identity], None] = unrecorded, inherited: Sequence[int] = ()
) -> Callable[[], Gate]:
    return partial(gate, argv, inherited=inherited, cwd="/", stderr=str(directory / "stderr"), record=record)


def touch(path: Path) -> tuple[str, ...]:
    return "/usr/bin/touch", str(path)


async def test_the_program_runs_only_after_it_was_recorded(start: Starter, directory: Path) -> None:
    recorded: list[Identity] = []

    def record(identity: Identity) -> None:
        assert not (directory / "ran").exists()
        assert program_of(identity).name in {"dash", "bash", "busybox", "sh"}
        recorded.append(identity)

    process = await start(*touch(directory / "ran"), record=record)
    assert await process.wait() == ExitStatus(code=0)
    assert recorded == [process.identity]
    assert (directory / "ran").exists()


async def test_the_program_has_the_identity_of_the_gate(start: Starter, directory: Path) -> None:
    process = await start("/bin/sh", "-c", "exec cat /proc/self/stat")
    await process.wait()
    stat = (directory / "stderr").read_text().split()
    assert (int(stat[0]), int(stat[21])) == (process.identity.pid, process.identity.start_time)
    assert process.identity.boot_id == BOOT_ID


async def test_a_recorder_that_fails_keeps_the_program_from_running(directory: Path) -> None:
    def record(identity: Identity) -> None:
        seen.append(identity)
        raise OSError("disk on fire")

    seen: list[Identity] = []
    with pytest.raises(OSError, match="disk on fire"):
        await launch(before(directory, touch(directory / "ran"), record))
    assert not (directory / "ran").exists()
    with pytest.raises(NotOurs):
        await adopt(seen[0])  # gone, and reaped


async def test_a_caller_that_is_cancelled_while_recording_keeps_the_program_from_running(directory: Path) -> None:
    others = children()
    recording, cancelled, undone = threading.Event(), threading.Event(), threading.Event()

    def record(_identity: Identity) -> None:
        recording.set()
        assert cancelled.wait(PATIENCE_S)

    command = launch(before(directory, touch(directory / "ran"), record), undo=undone.set)
    task = asyncio.create_task(command, name="launch")
    assert await asyncio.to_thread(recording.wait, PATIENCE_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    cancelled.set()
    assert await asyncio.to_thread(undone.wait, PATIENCE_S)
    assert not (directory / "ran").exists()
    assert children() <= others


async def test_a_caller_that_is_cancelled_while_spawning_leaves_no_gate(directory: Path) -> None:
    others = children()
    command = launch(before(directory, touch(directory / "ran")))
    task = asyncio.create_task(command, name="launch")
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # it is in the thread now
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await quiet()
    assert not (directory / "ran").exists()
    assert children() <= others


async def test_a_daemon_that_is_killed_before_the_record_leaves_nothing_running(directory: Path) -> None:
    daemon = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        DYING_DAEMON,
        str(directory / "stderr"),
        *touch(directory / "ran"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert daemon.stdout is not None
    identity = msgspec.json.decode(await daemon.stdout.readline(), type=Identity)
    gate = await adopt(identity)
    daemon.kill()
    await daemon.wait()
    async with asyncio.timeout(PATIENCE_S):
        assert await gate.wait() == ExitStatus()
    assert not (directory / "ran").exists()


@pytest.mark.parametrize("written", [b"", b"go"], ids=["nothing", "half a line"])
def test_a_gate_whose_pipe_ends_too_early_runs_nothing(directory: Path, written: bytes) -> None:
    command = ["/bin/sh", "-c", process_module._GATE, "qmpd-gate", *touch(directory / "ran")]
    assert subprocess.run(command, input=written, check=False, timeout=PATIENCE_S).returncode != 0
    assert not (directory / "ran").exists()


async def test_a_gate_that_somebody_kills_is_an_exit_and_not_an_error(start: Starter, directory: Path) -> None:
    def record(identity: Identity) -> None:
        os.kill(identity.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # reaped already
            os.waitid(os.P_PID, identity.pid, os.WEXITED | os.WNOWAIT)

    process = await start(*touch(directory / "ran"), record=record)
    assert await process.wait() == ExitStatus(signal="SIGKILL")
    assert not (directory / "ran").exists()


async def test_arguments_arrive_as_they_are(start: Starter, directory: Path) -> None:
    words = ["", " ", "a b", "$HOME", "`id`", "'", '"', "\\", "*", "-n", "a\nb", "ä", "\udcff"]
    process = await start("/usr/bin/printf", "%s\\0", *words)
    await process.wait()
    assert (directory / "stderr").read_bytes().decode("utf-8", "surrogateescape").split("\0") == [*words, ""]


async def test_nothing_of_the_daemon_reaches_the_program(start: Starter, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMPD_TOKEN", "secret")
    monkeypatch.setenv("LD_PRELOAD", "")
    script = 'env | cut -d= -f1 | sort | tr "\\n" " "; umask; pwd; ulimit -Hc; readlink /proc/self/fd/0; ls -x /proc/self/fd'
    process = await start("/bin/sh", "-c", script, cwd=str(directory))
    await process.wait()
    variables, cwd, core, stdin, descriptors = (directory / "stderr").read_text().splitlines()
    assert (variables, cwd, core, stdin) == ("LC_ALL PATH PWD QEMU_AUDIO_DRV 0077", str(directory), "0", "/dev/null")
    assert descriptors.split() == ["0", "1", "2", "3"]  # the last is the directory being listed


async def test_the_program_leads_its_own_session(start: Starter) -> None:
    process = await start("/bin/sleep", "1000")
    assert os.getsid(process.identity.pid) == process.identity.pid != os.getsid(0)


async def test_listeners_are_inherited_under_their_own_numbers(directory: Path) -> None:
    async with bound_listeners({"qmp": str(directory / "qmp")}) as listeners:
        number = listeners["qmp"].fileno()
        script = f"import socket; print(socket.socket(fileno={number}).getsockname())"
        argv = [sys.executable, "-c", script]
        process = await launch(before(directory, argv, inherited=[listeners["qmp"].fileno()]))
    await process.wait()
    assert await stderr_tail(str(directory / "stderr")) == f"{directory / 'qmp'}\n"


async def test_a_client_of_a_passed_listener_is_reset_when_the_program_dies(directory: Path) -> None:
    async with bound_listeners({"qmp": str(directory / "qmp")}) as listeners:
        argv = ["/bin/sleep", "1000"]
        process = await launch(before(directory, argv, inherited=[listeners["qmp"].fileno()]))
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(directory / "qmp"))
        process.signal(signal.SIGKILL)
        await process.wait()
        with pytest.raises(ConnectionResetError):
            waiting.recv(1)


async def test_what_a_program_says_is_found_after_what_was_said_before(start: Starter, directory: Path) -> None:
    (directory / "stderr").write_text("an earlier start failed\n")
    process = await start("/bin/sh", "-c", "echo out; echo err >&2")
    await process.wait()
    assert await stderr_tail(str(directory / "stderr")) == "an earlier start failed\nout\nerr\n"
    assert await stderr_tail(str(directory / "stderr"), start=process.stderr_start) == "out\nerr\n"


async def test_a_program_that_is_not_there_ends_with_127_and_the_shells_words(start: Starter, directory: Path) -> None:
    process = await start("/absent/qemu-system-x86_64")
    assert await process.wait() == ExitStatus(code=127)
    assert "/absent/qemu-system-x86_64: not found" in await stderr_tail(str(directory / "stderr"))


@pytest.mark.parametrize(
    ("argv", "cwd", "words"),
    [
        (("/bin/true",), "/absent", "No such file or directory"),
        (("/bin/true", "x" * 200_000), "/", "Argument list too long"),
        (("/bin/true", "a\0b"), "/", "null byte"),
    ],
    ids=["no directory", "too long", "NUL"],
)
async def test_a_launch_the_kernel_refuses_says_why(start: Starter, argv: tuple[str, ...], cwd: str, words: str) -> None:
    with pytest.raises(LaunchFailed, match=words):
        await start(*argv, cwd=cwd)


async def test_a_link_in_the_place_of_the_output_is_not_followed(start: Starter, directory: Path) -> None:
    (directory / "stderr").symlink_to(directory / "elsewhere")
    with pytest.raises(LaunchFailed, match="symbolic link"):
        await start("/bin/echo", "hello")
    assert not (directory / "elsewhere").exists()


async def test_without_descriptors_the_host_is_busy_and_nothing_is_left(
    start: Starter, directory: Path, few_descriptors: Callable[[int], None]
) -> None:
    others = children()
    refused = 0
    for more in range(12):
        few_descriptors(more)
        try:
            process = await start(*touch(directory / "ran"))
        except Busy:
            refused += 1
            few_descriptors(50)
            assert not (directory / "ran").exists()
            assert children() <= others
        else:
            few_descriptors(50)
            assert await process.wait() == ExitStatus(code=0)
            break
    assert 2 < refused < 12
