"""The methods of the client about migrations: what a person asks for, and what one daemon asks of another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from qmpd.migration.likeness import DestinationFacts
from qmpd.migration.protocol import Acceptance, DiscardRequest, Endpoint, Handover, Landed, LoadedRequest, Offer, RecoverRequest, Standing
from qmpd.migrationviews import GoalChanges, MigrateRequest, MigrationList, MigrationView, MoveDiskRequest, ResolveRequest, UpgradeRequest
from qmpd.views import JobView
from qmpd_api.connection import MARGIN_S, PROBE_DEADLINE_S, Connection, segment

#: A machine that is waited for under a link that is down is asked for again: better soon than after minutes.
VERB_S: Final = 15.0
#: The other side starts a QEMU first, and looks at files before.
OFFER_S: Final = 60.0


class MigrationVerbs(ABC):
    """One method per route, as in the rest of the client."""

    @property
    @abstractmethod
    def connection(self) -> Connection:
        """The pool of connections to the daemon."""

    async def migrate(self, name: str, request: MigrateRequest) -> JobView:
        """Move a machine to a peer, or copy it; returns the job that does it. Its result is a MigrationReport, with `copy` a CopyReport,
        and with `dry_run` a DryRunReport."""
        path = f"/v1/machines/{segment(name)}/migrate"
        return await self.connection.call("POST", path, JobView, body=request, deadline_s=PROBE_DEADLINE_S)

    async def move_disk(self, name: str, disk: int, request: MoveDiskRequest) -> JobView:
        """Move a disk of a running machine to another file of its host; returns the job that does it. Its result is a DiskMoved."""
        return await self.connection.call("POST", f"/v1/machines/{segment(name)}/disks/{disk}/move", JobView, body=request)

    async def upgrade_emulator(self, name: str, request: UpgradeRequest) -> JobView:
        """Have another QEMU take the place of a machine's; returns the job that does it. Its result is an UpgradeReport."""
        path = f"/v1/machines/{segment(name)}/upgrade-emulator"
        return await self.connection.call("POST", path, JobView, body=request, deadline_s=PROBE_DEADLINE_S)

    async def tune_migration(self, name: str, changes: GoalChanges) -> MigrationView:
        """Give a migration that is under way another goal."""
        return await self.connection.call("PATCH", f"/v1/machines/{segment(name)}/migration", MigrationView, body=changes)

    async def migrations(self, machine: str | None = None) -> MigrationList:
        """The migrations to and from this host, newest first."""
        return await self.connection.call("GET", "/v1/migrations", MigrationList, query={"machine": machine})

    async def resolve_migration(self, name: str, request: ResolveRequest) -> MigrationView:
        """Decide what nobody can find out: see ResolveRequest."""
        path = f"/v1/machines/{segment(name)}/migration/resolve"
        return await self.connection.call("POST", path, MigrationView, body=request)

    async def offer(self, offer: Offer) -> Acceptance:
        """Have a peer get ready for a machine."""
        return await self.connection.call("POST", "/v1/peer/migrations", Acceptance, body=offer, deadline_s=OFFER_S)

    async def tried(self, offer: Offer) -> DestinationFacts:
        """Have a peer try a machine: what it has for it, and what a QEMU with its definition is made of there."""
        return await self.connection.call("POST", "/v1/peer/trials", DestinationFacts, body=offer, deadline_s=OFFER_S)

    async def carried(self, freight: bytes) -> Landed:
        """Send a peer bytes that it throws away, to find out how fast the way is."""
        return await self.connection.call("PUT", "/v1/peer/freight", Landed, body=freight, deadline_s=VERB_S)

    async def loaded(self, migration: str, request: LoadedRequest) -> Standing:
        """Wait until the destination has the whole state, or the time of the request is over."""
        path = f"/v1/peer/migrations/{segment(migration)}/loaded"
        return await self.connection.call("POST", path, Standing, body=request, deadline_s=request.timeout_s + MARGIN_S)

    async def take(self, migration: str, handover: Handover) -> Standing:
        """Tell the destination that it is the owner."""
        path = f"/v1/peer/migrations/{segment(migration)}/take"
        return await self.connection.call("POST", path, Standing, body=handover, deadline_s=VERB_S)

    async def recover(self, migration: str) -> Endpoint:
        """Have the destination listen again for memory that follows a guest there."""
        path = f"/v1/peer/migrations/{segment(migration)}/recover"
        return await self.connection.call("POST", path, Endpoint, body=RecoverRequest(), deadline_s=VERB_S)

    async def discard(self, migration: str, request: DiscardRequest) -> Standing:
        """Tell the destination that it will not get the machine."""
        path = f"/v1/peer/migrations/{segment(migration)}/discard"
        return await self.connection.call("POST", path, Standing, body=request, deadline_s=VERB_S)

    async def standing(self, migration: str) -> Standing:
        """How far the peer is with a migration."""
        return await self.connection.call("GET", f"/v1/peer/migrations/{segment(migration)}", Standing, deadline_s=VERB_S)
