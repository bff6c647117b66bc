"""Booting one machine up to its milestone, and what is known of it on the way."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from typing import Final

from qmpd.errors import Conflict, Invalid, NotFound, QmpdError
from qmpd.lifecycle import State
from qmpd.views import ExpectRequest, ExpectResult
from qmpd_api.client import Client
from scripts.lib.demo_guests import Showing

#: The slowest guest needs under a minute alone; with three others on two busy cores it was seen to need three. Twice that, and room.
DEADLINE_S: Final = 600.0
#: A guest that lost what was typed is told again. None was seen to take longer than this to react.
TYPE_EVERY_S: Final = 15.0
#: The state of a machine that is over and was not to be kept.
REMOVED: Final = "removed"
#: Colours and cursor movements of firmware and installers.
ESCAPES: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[()][0-9A-B]|[=>78cDEHM])|[\x00-\x08\x0b-\x1f\x7f]")


@dataclass
class Boot:
    """A machine of the demo as far as it has come. `seconds` is from the request to create it until the milestone, or the end."""

    showing: Showing
    state: str = "waiting"
    accel: str | None = None
    line: str = ""
    began: float | None = None
    seconds: float | None = None
    reached: bool = False
    problem: str | None = None
    tail: str = ""

    @property
    def over(self) -> bool:
        """Whether there is nothing more to come."""
        return self.reached or self.problem is not None


async def run(client: Client, boot: Boot, *, keep: bool) -> None:
    """Create the machine and bring it to its milestone, within DEADLINE_S. Never raises for what the machine or the daemon does.

    A machine that is not kept is gone afterwards; one that is kept is paused, as idle boot loaders keep a processor busy.
    """
    clock = asyncio.get_running_loop().time
    boot.began = clock()
    boot.state = "creating"
    name = boot.showing.spec.name
    try:
        view = await client.create(boot.showing.spec, start=True)
        boot.accel, boot.state = view.accel, str(view.state)
        result = await _milestone(client, boot, boot.began + DEADLINE_S)
        boot.seconds = clock() - boot.began
        boot.tail = plain(result.tail)
        if result.matched:
            boot.reached = True
        else:
            boot.problem = await _failure(client, name, result)
        if keep:
            boot.state = str((await client.pause(name)).state) if boot.reached else boot.state
        else:
            await discard(client, name)
            boot.state = REMOVED
    except QmpdError as error:
        boot.seconds = boot.seconds or clock() - boot.began
        boot.problem = boot.problem or _explained(error)


async def discard(client: Client, name: str) -> None:
    """End a machine and forget it. One that is gone already is no error."""
    try:
        await client.kill(name)
        await client.delete(name, (await client.machine(name)).revision)
    except (Conflict, NotFound):
        return


def plain(text: str) -> str:
    """Console output without what would move a cursor."""
    return ESCAPES.sub("", text)


async def _milestone(client: Client, boot: Boot, limit: float) -> ExpectResult:
    """Wait for the guest's milestone, typing what it wants typed, again if it does not react."""
    guest, name = boot.showing.guest, boot.showing.spec.name
    clock = asyncio.get_running_loop().time
    if guest.send_after is not None:
        asked = await client.expect(name, ExpectRequest(pattern=guest.send_after, from_start=True, timeout_s=limit - clock()))
        if not asked.matched:
            return asked
    while True:
        left = max(0.0, limit - clock())
        wait = left if guest.send is None else min(left, TYPE_EVERY_S)
        result = await client.expect(name, ExpectRequest(pattern=guest.expect, send=guest.send, from_start=True, timeout_s=wait))
        if result.reason != "timeout" or clock() >= limit:
            return result


async def _failure(client: Client, name: str, result: ExpectResult) -> str:
    if result.reason == "timeout":
        return f"not reached in {DEADLINE_S:.0f} s"
    ending = (await client.machine(name)).exit
    if ending is None:
        return "the machine ended"
    how = f"signal {ending.signal}" if ending.signal else f"exit code {ending.code}"
    return f"the machine ended ({how}) {plain(ending.stderr_tail)}".strip()


def _explained(error: QmpdError) -> str:
    if isinstance(error, Invalid):
        return "; ".join(f"{problem.path}: {problem.message}" for problem in error.problems)
    return error.message


async def watch(client: Client, boots: dict[str, Boot]) -> None:
    """Bring what the daemon's list says of the machines into `boots`, once."""
    for view in (await client.machines()).machines:
        boot = boots.get(view.name)
        if boot is not None and not boot.over:
            boot.accel, boot.state, boot.line = view.accel, str(view.state), plain(view.console_line)
            if view.state is State.CRASHED and view.exit is not None:
                boot.line = plain(view.exit.stderr_tail) or boot.line
