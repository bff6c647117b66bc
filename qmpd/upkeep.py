"""What whoever looks after a daemon asks of it: what is wrong, what it counts, and a bundle to send along with a question."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from qmpd.bus import Bus
from qmpd.doctor import Doctor
from qmpd.inventory import Inventory
from qmpd.jobs import Jobs
from qmpd.journal import Journal
from qmpd.peering import Peering
from qmpd.registry import Registry
from qmpd.sampling import Sampler
from qmpd.settings import Settings
from qmpd.tally import Tally
from qmpd.views import DoctorReport, Version

if TYPE_CHECKING:
    from qmpd.bundle import Bundles
    from qmpd.metrics import Metrics


class Upkeep:
    """Verbs that look at the whole daemon and change nothing.

    What they need beyond the daemon's own modules is imported when it is asked for: a daemon that starts has machines waiting for it.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        registry: Registry,
        inventory: Inventory,
        journal: Journal,
        bus: Bus,
        jobs: Jobs,
        sampler: Sampler,
        tally: Tally,
        peering: Peering,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._inventory = inventory
        self._journal = journal
        self._bus = bus
        self._jobs = jobs
        self._sampler = sampler
        self._tally = tally
        self._doctor = Doctor(settings, registry, journal, bus, peering)
        self._metrics: Metrics | None = None

    async def doctor(self) -> DoctorReport:
        """What is wrong with this daemon and its machines, and what to do about it."""
        return await self._doctor.examine()

    async def bundle(self, daemon: Version) -> AsyncIterator[bytes]:
        """What somebody who helps wants to see of this daemon, as a compressed archive, piece by piece."""
        bundles = await asyncio.to_thread(self._bundles)
        async for piece in bundles.pieces(daemon):
            yield piece

    async def metrics(self) -> bytes:
        """The metrics of this daemon."""
        metrics = await asyncio.to_thread(self._counted)
        return await metrics.text()

    def _counted(self) -> Metrics:
        from qmpd.metrics import Metrics

        self._metrics = self._metrics or Metrics(self._registry, self._bus, self._sampler, self._tally)
        return self._metrics

    def _bundles(self) -> Bundles:
        from qmpd.bundle import Bundles

        return Bundles(
            settings=self._settings,
            registry=self._registry,
            inventory=self._inventory,
            journal=self._journal,
            jobs=self._jobs,
            doctor=self._doctor,
            metrics=self._counted(),
        )
