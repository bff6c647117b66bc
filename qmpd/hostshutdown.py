"""The end of all machines, because their host goes down: in the reverse of their start's order, many at once, each in its own time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from qmpd import operating, power
from qmpd.autostart import Wave, waves
from qmpd.errors import GoingDown, Held, QmpdError
from qmpd.jobs import Report
from qmpd.lifecycle import AT_REST, State
from qmpd.machine import Machine
from qmpd.registry import Registry
from qmpd.views import ErrorBody, HostShutdownRequest, HostShutdownView, MachineEnd, Progress, ShutdownRequest, StopView

#: Guests that shut down write to their disks; more of them at once only take longer each, and most of the time is waiting.
AT_ONCE: Final = 16
#: A verb that holds a machine is let finish for this long: launching QEMU takes a second, `stop` at most a minute.
VERB_PATIENCE_S: Final = 60.0
#: What is replaced, instead of waited for: it waits for the same.
REPLACED: Final = frozenset({"shutdown"})

_log = logging.getLogger(__name__)


class HostShutdown:
    """Whether the host goes down, and how its machines are ended. One at a time."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        #: Machines are being ended now: none may start.
        self.under_way = False
        #: It was under way at some time: what starts machines by itself has no business any more.
        self.asked = False

    def refuse(self, done: str = "started") -> None:
        """Raises GoingDown while machines are being ended: what cannot be `done` with one."""
        if self.under_way:
            raise GoingDown(f"all machines of this host are being shut down: none can be {done} now")

    async def run(self, request: HostShutdownRequest, report: Report, first: Callable[[], Awaitable[None]]) -> HostShutdownView:
        """Ends every machine that has a process; those that could not be ended are in the answer like the others.

        `first` is done before, when nothing can be started any more.

        Raises:
            GoingDown: that is under way already.
        """
        self.refuse()
        self.under_way = self.asked = True
        try:
            await first()
            return await self._all(request, report)
        finally:
            self.under_way = False

    async def _all(self, request: HostShutdownRequest, report: Report) -> HostShutdownView:
        ends: list[MachineEnd] = []
        to_end = [machine for machine in self._registry if machine.state not in AT_REST or machine.operation is not None]
        for machine in self._registry:
            if machine.state in AT_REST:
                machine.asked_to_end = True  # whatever waits to start it again need not
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(machine: Machine, wave: Wave) -> None:
            async with turns:
                ends.append(await _ended(machine, request))
            await report(Progress(phase=f"order {wave.order}", done=len(ends), total=len(to_end), unit="machines"))

        by_name = {machine.name: machine for machine in to_end}
        for wave in reversed(waves(machine.definition.spec for machine in to_end)):
            async with asyncio.TaskGroup() as group:
                for name in wave.names:
                    group.create_task(one(by_name[name], wave), name=f"host-shutdown:{name}")
        left = sum(end.error is not None for end in ends)
        _log.info("machines were ended for the host", extra={"ended": len(ends) - left, "left": left})
        return HostShutdownView(machines=tuple(ends), left=left)


async def _ended(machine: Machine, request: HostShutdownRequest) -> MachineEnd:
    try:
        end = await _end(machine, request)
    except QmpdError as error:
        _log.error("machine could not be ended for the host", extra={"machine": machine.name, "code": error.code, "error": error.message})
        return MachineEnd(
            machine=machine.name, method=None, clean=False, error=ErrorBody(code=error.code, message=error.message, details=error.details)
        )
    return MachineEnd(machine=machine.name, method=end.method, clean=end.clean)


async def _end(machine: Machine, request: HostShutdownRequest) -> StopView:
    """The ladder: the guest is asked, then `quit`, then SIGTERM; SIGKILL only where the caller said so."""
    if not await machine.when(lambda: machine.operation is None or machine.operation in REPLACED, VERB_PATIENCE_S):
        if request.then != "kill":
            raise Held(f"machine {machine.name!r} is held by {machine.operation!r}", holder=machine.operation, state=str(machine.state))
        return await power.kill(machine)
    async with machine.held("host-shutdown", instead_of=REPLACED):
        try:
            return await _in_order(machine, request)
        except QmpdError as error:
            if request.then != "kill":
                raise
            _log.warning("machine does not end and is killed", extra={"machine": machine.name, "error": error.message})
            return await power.kill(machine)


async def _in_order(machine: Machine, request: HostShutdownRequest) -> StopView:
    if machine.state is State.RUNNING:
        try:
            ended = await operating.shut_down(machine, ShutdownRequest(timeout_s=request.timeout_s, then="stop"))
        except QmpdError as error:
            _log.info("guest could not be asked", extra={"machine": machine.name, "error": error.message})
        else:
            if machine.state in AT_REST:
                return ended
    return await power.stop(machine)
