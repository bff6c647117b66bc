"""The ledger of migrations: how far this host got with each, written before the next step is taken.

It is a log for going on after a restart. Who owns a machine is said by its definition (`record.Definition`), which the steps `give` and
`take` commit; where both disagree after a crash, the definition is right.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import msgspec

from qmpd.database import Database
from qmpd.errors import NotFound
from qmpd.failpoint import passing
from qmpd.journal import timestamp, utc_now
from qmpd.migration.outgoing import Before
from qmpd.migration.phases import FIRST, Phase, Role, Step, after
from qmpd.migration.protocol import Handover, Offer, Standing
from qmpd.tasks import undivided

#: Settled migrations that are kept, so that a peer that asks late gets its answer.
KEPT_SETTLED: Final = 1_000
#: Of what went wrong in words.
REASON_CHARACTERS: Final = 1_000

_log = logging.getLogger(__name__)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One migration as this side of it knows it.

    `id` and `epoch` are the source's. `reason` says why it was kept or discarded. `settled` means that nothing is left to be done for
    it, and that the peer has heard what it must hear. `offer` is what the source offered; `went` that the guest ran when it was halted.
    `before` is how this side's QEMU was set before the migration, `made` the files outside of the machine's own directory that were made,
    `log_ends` where the logs of its serial ports ended at the source.
    """

    id: str
    role: Role
    machine: str
    uuid: str
    peer: str
    epoch: int
    phase: Phase
    offer: Offer
    went: bool
    began_at: str
    changed_at: str
    before: Before | None = None
    made: tuple[str, ...] = ()
    log_ends: dict[int, int] = {}
    reason: str = ""
    settled: bool = False

    @property
    def at_rest(self) -> bool:
        """Whether the machine does not run, and all of it are files."""
        return self.offer.state == "stopped"

    @property
    def is_copy(self) -> bool:
        """Whether the machine stays where it is, and another one is made of it: of that is the offer, and the UUID."""
        return self.offer.copy_of is not None

    def standing(self, problem: str = "", handover: Handover | None = None) -> Standing:
        """What the peer is told of it: how far this side is, what keeps it from going on, and what goes with a machine that is given."""
        return Standing(
            id=self.id,
            machine=self.machine,
            role=self.role,
            phase=self.phase,
            epoch=self.epoch,
            reason=self.reason,
            problem=problem,
            handover=handover,
        )


def first_entry(offer: Offer, machine: str, peer: str, before: Before | None = None) -> Entry:
    """The entry with which a migration of a machine begins at its source."""
    moment = timestamp(utc_now())
    return Entry(
        id=offer.id,
        role="source",
        machine=machine,
        uuid=offer.uuid,
        peer=peer,
        epoch=offer.epoch,
        phase=FIRST["source"],
        offer=offer,
        went=offer.state == "running",
        before=before,
        began_at=moment,
        changed_at=moment,
    )


class Ledger:
    """All entries that are not settled, and the newest that are; in memory, and in the database first. Made by `open_ledger`."""

    def __init__(self, database: Database, entries: Iterator[Entry]) -> None:
        self._database = database
        self._entries = {entry.id: entry for entry in entries}

    def get(self, migration: str) -> Entry:
        """The entry of this id. Raises NotFound."""
        try:
            return self._entries[migration]
        except KeyError:
            raise NotFound(f"there is no migration {migration!r}", migration=migration) from None

    def all(self) -> list[Entry]:
        """Every entry, the newest first."""
        return list(reversed(self._entries.values()))

    def unsettled(self, role: Role) -> list[Entry]:
        """What this side still has to do something for."""
        return [entry for entry in self._entries.values() if entry.role == role and not entry.settled]

    def of(self, machine: str) -> Entry | None:
        """The unsettled entry of a machine, if there is one: the newest, where an older one still waits for its peer."""
        found = [entry for entry in self._entries.values() if entry.machine == machine and not entry.settled]
        return found[-1] if found else None

    async def begin(self, entry: Entry) -> Entry:
        """Writes a new entry down."""
        await passing(f"migration-{entry.phase}")
        await undivided(self._inserted(entry), f"begin:{entry.machine}")
        for settled in self._surplus():
            del self._entries[settled]
        await passing(f"migration-{entry.phase}-written")
        return entry

    async def _inserted(self, entry: Entry) -> None:
        """Who goes away meanwhile leaves an entry that is known, and not one that only the database has."""
        await self._database.write(partial(_insert, entry=entry))
        self._entries[entry.id] = entry

    async def step(self, migration: str, step: Step, **noted: object) -> Entry:
        """Writes a step down, and what else is to be `noted` in the entry; raises IllegalStep where the table has none from here."""
        entry = self.get(migration)
        phase = after(entry.role, entry.phase, step)
        if isinstance(reason := noted.get("reason"), str):
            noted["reason"] = _plain(reason)
        changed = msgspec.structs.replace(entry, phase=phase, changed_at=timestamp(utc_now()), **noted)
        await passing(f"migration-{changed.phase}")
        await self._change(changed)
        await passing(f"migration-{changed.phase}-written")
        return changed

    async def note(self, migration: str, **noted: object) -> Entry:
        """Writes down more about a migration, in the phase that it is in."""
        entry = msgspec.structs.replace(self.get(migration), changed_at=timestamp(utc_now()), **noted)
        await self._change(entry)
        return entry

    async def settle(self, migration: str) -> Entry:
        """Notes that nothing is left to be done."""
        entry = self.get(migration)
        if not entry.settled:
            entry = msgspec.structs.replace(entry, settled=True, changed_at=timestamp(utc_now()))
            await passing("migration-settled")
            await self._change(entry)
        return entry

    async def _change(self, entry: Entry) -> None:
        await self._database.write(partial(_update, entry=entry))
        self._entries[entry.id] = entry

    def _surplus(self) -> list[str]:
        settled = [entry.id for entry in self._entries.values() if entry.settled]
        return settled[: max(0, len(settled) - KEPT_SETTLED)]


@asynccontextmanager
async def open_ledger(database: Database) -> AsyncIterator[Ledger]:
    """The ledger of the database."""
    entries = await database.read(_read)
    yield Ledger(database, iter(entries))


def _read(connection: sqlite3.Connection) -> list[Entry]:
    found = []
    for ident, encoded in connection.execute("SELECT id, entry FROM migration ORDER BY number"):
        try:
            found.append(msgspec.msgpack.decode(encoded, type=Entry))
        except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
            _log.error(
                "an entry of the ledger of migrations is damaged and was left alone", extra={"migration": ident, "error": str(error)}
            )
    return found


def _plain(text: str) -> str:
    """Words that may come from a guest's QEMU, as they can be sent to a peer: in one line, and not too many."""
    return "".join(char if char.isprintable() else " " for char in text)[:REASON_CHARACTERS]


def _insert(connection: sqlite3.Connection, entry: Entry) -> None:
    connection.execute("INSERT OR REPLACE INTO migration VALUES (NULL, ?, ?, ?)", (entry.id, entry.settled, msgspec.msgpack.encode(entry)))
    connection.execute(
        "DELETE FROM migration WHERE settled AND number <= (SELECT max(number) FROM migration WHERE settled) - ?", (KEPT_SETTLED,)
    )


def _update(connection: sqlite3.Connection, entry: Entry) -> None:
    connection.execute("UPDATE migration SET settled = ?, entry = ? WHERE id = ?", (entry.settled, msgspec.msgpack.encode(entry), entry.id))
