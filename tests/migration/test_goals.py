"""Real QEMUs with a guest that changes its memory faster than it can be sent: what the goal says is what happens."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest

from qmpd.errors import MigrationFailed
from qmpd.migration.capabilities import Agreed
from qmpd.migration.convergence import Abilities, Abort, Decision, Pause, Postcopy, Set, Tuner, opening
from qmpd.migration.incoming import Listen, listen
from qmpd.migration.measuring import sample_of
from qmpd.migration.outgoing import Outgoing
from qmpd.migration.progress import Progress
from qmpd.migration.qemu import Qemu
from qmpd.migrationviews import Goal
from tests.migration.ends import End, Ends, at, outgoing_to
from tests.process.emulator import PATIENCE_S

pytestmark = pytest.mark.qemu
MIB = 1024 * 1024
#: Sending the guest's 16 MiB at the 20 MiB/s of the goals here takes 0.8 s, and the guest changes all of them many times meanwhile.
WORKING_SET = 16 * MIB
MEMORY = ("-m", "64")
_LOADED_AT = 0x100000
WRITES_FROM = 0x1000000


def busy_kernel(path: Path, working_set: int = WORKING_SET) -> Path:
    """A multiboot kernel that adds one to every page of its working set (bytes), over and over."""
    code = bytearray(b"\xfa")  # cli
    again = len(code)
    code += b"\xbf" + struct.pack("<I", WRITES_FROM)  # mov edi, from
    page = len(code)
    code += b"\xff\x07\x81\xc7" + struct.pack("<I", 4096)  # inc dword [edi]; add edi, 4096
    code += b"\x81\xff" + struct.pack("<I", WRITES_FROM + working_set)  # cmp edi, to
    code += b"\x72" + struct.pack("b", page - (len(code) + 2))  # jb page
    code += b"\xeb" + struct.pack("b", again - (len(code) + 2))  # jmp again
    magic, flags = 0x1BADB002, 0x10000
    header = struct.pack("<III", magic, flags, -(magic + flags) & 0xFFFFFFFF)
    header += struct.pack("<IIIII", _LOADED_AT, _LOADED_AT, 0, 0, _LOADED_AT + 32)
    path.write_bytes(header + code)
    return path


class Mover:
    """Does what the tuner decides, as the source's daemon does."""

    def __init__(self, source: End, outgoing: Outgoing, tuner: Tuner) -> None:
        self.source, self.outgoing, self.tuner = source, outgoing, tuner
        self.began = asyncio.get_running_loop().time()
        self.loosened: Goal | None = None
        self.enough_percent = 100

    async def report(self, progress: Progress) -> None:
        now = asyncio.get_running_loop().time() - self.began
        for decision in self.tuner.decide(sample_of(progress, now)):
            await self.do(decision)
        if self.loosened is not None and progress.passes > 5:
            for decision in self.tuner.change(self.loosened, now):
                await self.do(decision)
            self.loosened = None

        if progress.throttle_percent >= self.enough_percent:
            raise MigrationFailed("seen enough")

    async def do(self, decision: Decision) -> None:
        match decision:
            case Set():
                await self.outgoing.tune(decision.parameters)
            case Pause():
                await self.source.monitor.execute("stop")
            case Postcopy():
                await self.source.monitor.execute("migrate-start-postcopy")
            case Abort():
                raise MigrationFailed(decision.reason)


async def at_work(qemu: Qemu, working_set: int = WORKING_SET) -> None:
    """Waits until the guest has written to the last page of its working set, after its BIOS: until then all of it is sent in a moment."""
    asked = {"command-line": f"xp /1wx {WRITES_FROM + working_set - 4096:#x}"}
    async with asyncio.timeout(PATIENCE_S):
        while "0x00000000" in str(await qemu.execute("human-monitor-command", asked)):
            await asyncio.sleep(0.02)


async def moving(ends: Ends, goal: Goal) -> Mover:
    """A source with a busy guest that is ready to be sent."""
    kernel = busy_kernel(ends.directory / "busy")
    source = await ends.start("-kernel", str(kernel), *MEMORY)
    destination = await ends.start("-kernel", str(kernel), "-incoming", "defer", *MEMORY)
    await source.monitor.execute("cont")
    await at_work(source.monitor)
    begin = opening(goal, Abilities())
    agreed = Agreed(postcopy="postcopy-ram" in begin.capabilities)
    endpoint = await listen(destination.monitor, Listen(memory=at(ends.directory), agreed=agreed))
    helping = tuple(name for name in begin.capabilities if name != "postcopy-ram")
    outgoing = await outgoing_to(source, endpoint, agreed=agreed, helping=helping, parameters=begin.parameters)
    return Mover(source, outgoing, Tuner(goal, Abilities()))


async def sent(mover: Mover) -> None:
    async with mover.outgoing:
        await mover.outgoing.prepare()
        await mover.outgoing.send(mover.report)
        await mover.outgoing.switch_over()


def goal(**changes: object) -> Goal:
    return Goal(downtime_ms=100, bandwidth_mib_s=20, auto_converge=False, **changes)  # type: ignore[arg-type]


async def test_near_its_deadline_it_is_halted_for_as_long_as_it_takes(ends: Ends) -> None:
    mover = await moving(ends, goal(deadline_s=8))
    await sent(mover)
    assert mover.outgoing.completed
    assert {entry.action for entry in mover.tuner.tuned} <= {"set", "pause"}
    assert mover.tuner.tuned[0].at_s >= 8 * 0.8
    measured = mover.tuner.measured
    assert measured.lowest_bytes is not None
    assert measured.lowest_bytes == pytest.approx(WORKING_SET, rel=0.1)


async def test_at_its_deadline_it_stays_if_the_goal_says_so(ends: Ends) -> None:
    mover = await moving(ends, goal(deadline_s=4, then="abort"))
    with pytest.raises(MigrationFailed, match="4 s have passed"):
        await sent(mover)
    assert await mover.source.status() == "running"
    assert [entry.action for entry in mover.tuner.tuned] == ["abort"]


async def test_near_its_deadline_it_runs_on_there_if_the_goal_says_so(ends: Ends) -> None:
    mover = await moving(ends, goal(deadline_s=5, then="postcopy"))
    await sent(mover)
    assert mover.outgoing.postcopy or mover.outgoing.completed
    assert [entry.action for entry in mover.tuner.tuned] == ["postcopy"]


async def test_a_goal_that_is_loosened_on_the_way_is_met(ends: Ends) -> None:
    mover = await moving(ends, goal())
    mover.loosened = Goal(downtime_ms=5000, bandwidth_mib_s=20, auto_converge=False)
    await sent(mover)
    figures = await mover.outgoing.figures()
    assert figures.status == "completed"
    assert [entry.parameters for entry in mover.tuner.tuned] == [{"downtime-limit": 4950}]


async def test_a_guest_that_changes_too_much_is_slowed_step_by_step(ends: Ends) -> None:
    mover = await moving(ends, Goal(downtime_ms=100, bandwidth_mib_s=20, deadline_s=60))
    mover.enough_percent = 40
    with pytest.raises(MigrationFailed, match="seen enough"):
        await sent(mover)
    assert [entry.parameters["max-cpu-throttle"] for entry in mover.tuner.tuned] == [20, 40]
    assert mover.tuner.progress("memory").throttle_percent == 40
