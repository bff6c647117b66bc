"""What the routes about migrations do: those of people, and those of peers."""

from __future__ import annotations

from qmpd.migration.likeness import DestinationFacts
from qmpd.migration.protocol import Acceptance, DiscardRequest, Endpoint, Handover, Landed, LoadedRequest, Offer, RecoverRequest, Standing
from qmpd.migrationviews import GoalChanges, MigrateRequest, MigrationList, MigrationView, MoveDiskRequest, ResolveRequest, UpgradeRequest
from qmpd.views import JobView
from qmpd_api.exchange import Call
from qmpd_api.queries import JobsQuery, Query


async def migrate(call: Call[MigrateRequest, Query]) -> JobView:
    """Move a machine."""
    return await call.service.migration.migrate(call.name, call.body)


async def move_disk(call: Call[MoveDiskRequest, Query]) -> JobView:
    """Move a disk on this host."""
    return await call.service.disk_moves.move(call.name, call.id, call.body)


async def upgrade_emulator(call: Call[UpgradeRequest, Query]) -> JobView:
    """Replace the QEMU under a running machine."""
    return await call.service.successions.upgrade(call.name, call.body)


async def tune_migration(call: Call[GoalChanges, Query]) -> MigrationView:
    """Another goal for a migration."""
    return await call.service.migration.tune(call.name, call.body)


async def migrations(call: Call[None, JobsQuery]) -> MigrationList:
    """The migrations of this host."""
    return call.service.migration.list(call.query.machine)


async def resolve_migration(call: Call[ResolveRequest, Query]) -> MigrationView:
    """Decide what nobody can find out."""
    return await call.service.migration.resolve(call.name, call.body)


async def offer(call: Call[Offer, Query]) -> Acceptance:
    """Get ready for a peer's machine."""
    return await call.service.migration.offer(call.caller, call.body)


async def tried(call: Call[Offer, Query]) -> DestinationFacts:
    """Whether a peer's machine could be here."""
    return await call.service.migration.tried(call.caller, call.body)


async def carried(call: Call[bytes, Query]) -> Landed:
    """Bytes of a peer that measures the way."""
    return call.service.migration.carried(call.caller, call.body)


async def loaded(call: Call[LoadedRequest, Query]) -> Standing:
    """Wait until it is here as a whole."""
    return await call.service.migration.loaded(call.caller, call.id, call.body)


async def take(call: Call[Handover, Query]) -> Standing:
    """It was given to this host."""
    return await call.service.migration.take(call.caller, call.id, call.body)


async def recover(call: Call[RecoverRequest, Query]) -> Endpoint:
    """Listen again."""
    return await call.service.migration.recover(call.caller, call.id)


async def discard(call: Call[DiscardRequest, Query]) -> Standing:
    """It will not be given to this host."""
    return await call.service.migration.discard(call.caller, call.id, call.body)


async def standing(call: Call[None, Query]) -> Standing:
    """How far this host is."""
    return await call.service.migration.standing(call.caller, call.id)
