from __future__ import annotations

import json
import termios
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from qmpctl.exits import Exit
from qmpd.errors import Invalid, NotFound, NotYet, QemuRefused, WrongState
from qmpd.lifecycle import State
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import MachineSpec
from qmpd.views import Event, ExpectRequest, ShutdownRequest
from qmpd_api.application import create
from qmpd_api.client import Client
from qmpd_api.server import serve
from tests.api.qmpctl_process import Piped, between_pipes, on_screen

pytestmark = pytest.mark.qemu

#: Its firmware is part of QEMU and prints within a second.
BOARD = "riscv64-virt"
BANNER = "OpenSBI v"
SPEC = MachineSpec(name="lab", board=BOARD, memory_mib=64)


@pytest.fixture
async def socket(service: Service, settings: Settings) -> AsyncIterator[Path]:
    async with serve(create(service), settings.socket):
        yield Path(settings.socket)


@pytest.fixture
def qmpctl(socket: Path) -> Piped:
    return partial(between_pipes, socket)


@pytest.fixture
async def client(socket: Path) -> AsyncIterator[Client]:
    async with Client(str(socket)) as opened:
        yield opened


async def test_run_expect_rm_leaves_nothing_behind(qmpctl: Piped, client: Client) -> None:
    code, out, err = await qmpctl("run", BOARD, "--memory", "64", "--rm", "--expect", r"OpenSBI v[0-9.]+")
    assert (code, err) == (Exit.OK, b"")
    assert out.decode().startswith(BANNER)
    assert (await client.machines()).machines == ()


async def test_a_machine_lives_and_dies_by_the_command_line(qmpctl: Piped, tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text(f'name = "lab"\nboard = "{BOARD}"\nmemory_mib = 64\n')
    steps: list[tuple[tuple[str, ...], int]] = [
        (("validate", str(file)), Exit.OK),
        (("create", str(file), "--start"), Exit.OK),
        (("expect", "lab", BANNER, "--from-start"), Exit.OK),
        (("start", "lab"), Exit.CONFLICT),
        (("delete", "lab"), Exit.CONFLICT),
        (("expect", "lab", "never printed", "--timeout", "0.1"), Exit.NO),
        (("qmp", "lab", "query-nonsense"), Exit.NO),
        (("shutdown", "lab", "--timeout", "0.1"), Exit.NO),
        (("wait", "lab", "--state", "crashed", "--timeout", "0"), Exit.NO),
        (("stop", "lab", "nobody"), Exit.NOT_FOUND),
        (("replace", str(file)), Exit.OK),
        (("delete", "lab"), Exit.OK),
        (("show", "lab"), Exit.NOT_FOUND),
    ]
    for words, expected in steps:
        code, out, err = await qmpctl(*words)
        assert code == expected, (words, out, err)


async def test_all_problems_of_a_definition_are_named(qmpctl: Piped, tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text(
        f'name = "lab"\nboard = "{BOARD}"\ndisks = [{{kind = "image", path = "none.img", format = "raw"}}]\nkernel = {{image = "none"}}\n'
    )
    code, out, _ = await qmpctl("validate", str(file))
    assert code == Exit.NO
    assert f"{file}: $.disks[0].path: " in out.decode()
    assert f"{file}: $.kernel.image: " in out.decode()


async def test_a_definition_comes_back_as_it_went_in(qmpctl: Piped, client: Client, tmp_path: Path) -> None:
    await client.create(SPEC)
    code, out, _ = await qmpctl("definition", "lab")
    assert code == Exit.OK
    (tmp_path / "lab.toml").write_bytes(out)
    stored = await client.definition("lab")
    assert (await qmpctl("replace", str(tmp_path / "lab.toml")))[0] == Exit.OK
    assert (await client.definition("lab")).spec == stored.spec


async def test_the_console_shows_the_guest_and_gives_the_terminal_back(socket: Path, client: Client) -> None:
    await client.create(SPEC, start=True)
    async with on_screen(socket, "console", "lab") as screen:
        await screen.until(BANNER.encode())
        assert screen.raw
        screen.press(b"\x1d")
        assert await screen.ended() == Exit.OK
        assert termios.tcgetattr(screen.slave) == screen.before
    assert (await client.machine("lab")).state is State.RUNNING
    async with on_screen(socket, "console", "lab") as screen:
        await screen.until(BANNER.encode())
        await client.kill("lab")
        await screen.until(b"lab has ended")
        assert await screen.ended() == Exit.OK


async def test_the_log_holds_what_the_console_printed(qmpctl: Piped, client: Client) -> None:
    await client.create(SPEC, start=True)
    assert (await client.expect("lab", ExpectRequest(pattern="MEDELEG.*", from_start=True))).matched
    await client.stop("lab")
    code, out, _ = await qmpctl("log", "lab")
    assert code == Exit.OK
    assert BANNER.encode() in out
    _, tail, _ = await qmpctl("log", "lab", "--tail", "3", "--json")
    assert out.endswith(json.loads(tail)["text"].encode())


async def test_the_client_speaks_to_the_daemon(client: Client) -> None:
    assert (await client.version()).api == "v1"
    assert BOARD in {board.id for board in await client.boards("riscv64")}
    assert (await client.board(BOARD)).board.machine == "virt"
    assert (await client.validate(SPEC)).ok
    assert "-machine" in (await client.command(SPEC)).argv
    assert (await client.create(SPEC)).state is State.STOPPED
    assert (await client.start("lab", paused=True)).state is State.PAUSED
    assert (await client.resume("lab")).state is State.RUNNING
    assert (await client.wait("lab", [State.RUNNING], 1)).name == "lab"
    with pytest.raises(NotYet):
        await client.wait("lab", [State.STOPPED], 0)
    with pytest.raises(QemuRefused):
        await client.screenshot("lab")
    job = await client.wait_job((await client.shutdown("lab", ShutdownRequest(timeout_s=0.1, then="stop"))).id)
    assert job.state == "succeeded"
    assert (await client.jobs("lab")).jobs[0] == job
    with pytest.raises(WrongState):
        await client.pause("lab")
    await client.delete("lab")
    with pytest.raises(NotFound):
        await client.machine("lab")
    with pytest.raises(Invalid) as caught:
        await client.create(MachineSpec(name="lab", board="no-such-board"))
    assert caught.value.problems[0].path == "$.board"


async def test_a_follower_of_events_sees_a_machine_come_and_go(client: Client) -> None:
    events = client.events(0)
    await client.create(SPEC)
    await client.delete("lab")
    kinds: list[str] = []
    while "machine.deleted" not in kinds:
        item = await anext(events)
        assert isinstance(item, Event)
        kinds.append(item.kind)
    assert kinds[0] == "machine.created"
    await events.aclose()
