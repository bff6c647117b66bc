"""The verbs for QEMUs that are out of sight, and for those that somebody else started."""

from __future__ import annotations

from typing import Final

import msgspec

from qmpd import power
from qmpd.catalogue import Catalogue
from qmpd.errors import Problem, invalid
from qmpd.foreign import listed
from qmpd.machine import Publish
from qmpd.processviews import AdoptRequest, ForgetRequest, ProcessView
from qmpd.recovery import Recovery
from qmpd.registry import Registry
from qmpd.takeover import Takeover
from qmpd.views import MachineView, StopView

#: Verbs that wait for an answer which need not come.
_WAITING: Final = frozenset({"stop", "shutdown", "reattach"})


class Rescue:
    """What `Service` answers with, one method for each verb. `recovery` finds the processes of earlier daemons."""

    def __init__(self, registry: Registry, catalogue: Catalogue, publish: Publish, run_dir: str) -> None:
        self.recovery = Recovery(registry, run_dir)
        self._registry = registry
        self._takeover = Takeover(registry, catalogue, publish)

    async def power_off(self, name: str) -> StopView:
        """Ends a machine's QEMU with SIGTERM, which needs no monitor."""
        machine = self._registry.get(name)
        async with machine.held("power-off", instead_of=_WAITING):
            await self.recovery.look_again(machine)
            ended = await power.power_off(machine)
        return msgspec.structs.replace(ended, machine=machine.view())

    async def reattach(self, name: str) -> MachineView:
        """Tries now to reach the QEMU of a machine that is unreachable or unresponsive."""
        machine = self._registry.get(name)
        async with machine.held("reattach"):
            await self.recovery.reattach(machine)
        return machine.view()

    async def forget(self, name: str, request: ForgetRequest) -> None:
        """Gives up a machine whose QEMU cannot be reached: its files stay, and its process is left alone."""
        machine = self._registry.get(name)
        if request.confirm != name:
            raise invalid([Problem(path="$.confirm", message=f"must be {name!r}, the name of the machine that is to be forgotten")])
        async with machine.held("forget"):
            await self.recovery.forget(machine)

    async def processes(self) -> list[ProcessView]:
        """The QEMUs of this host, ours and others."""
        return await listed(self._registry)

    async def adopt(self, request: AdoptRequest) -> MachineView:
        """Takes over a QEMU that somebody else started."""
        return (await self._takeover.adopt(request)).view()
