"""What peers may hand in at the moment: files and logs of machines that come, and what happened to those that came.

The ledger and the definitions say so, and nothing else. After a restart the same is asked of them again.
"""

from __future__ import annotations

from collections.abc import Mapping

from qmpd.access import Caller
from qmpd.errors import NotFound, WrongState
from qmpd.machine import Machine
from qmpd.migration.itemdesk import Delivery
from qmpd.migration.ledger import Entry, Ledger
from qmpd.migration.phases import OWNED, UNOWNED
from qmpd.peers import Peers
from qmpd.registry import Registry


class Admissions:
    """Knows what each migration may bring."""

    def __init__(self, registry: Registry, ledger: Ledger, peers: Peers) -> None:
        self._registry = registry
        self._ledger = ledger
        self._peers = peers
        #: Where logs ended, of machines that are being taken: known before it is written down.
        self._log_ends: dict[str, Mapping[int, int]] = {}

    def item(self, caller: Caller, migration: str) -> Delivery:
        """What the peer that asks may hand in. Raises NotFound, WrongState (`itemdesk.Admission`)."""
        entry = self._entry(caller, migration)
        machine = self._machine(entry)
        if machine is None or (entry.phase not in UNOWNED and entry.phase not in OWNED):
            raise WrongState(
                f"migration {migration!r} is over: nothing comes with it any more", state=str(entry.phase), allowed=["awaiting"]
            )
        return self.delivery(entry, tuple(machine.consoles))

    def arrived(self, caller: Caller, migration: str) -> str:
        """The machine that a migration of the peer that asks brought here. Raises NotFound, WrongState (`history.Arrived`)."""
        entry = self._entry(caller, migration)
        if entry.phase not in OWNED or self._machine(entry) is None:
            raise WrongState(f"the machine is not this host's own by migration {migration!r}", state=str(entry.phase), allowed=["arrived"])
        return entry.machine

    def delivery(self, entry: Entry, serial_ports: tuple[int, ...]) -> Delivery:
        """What a migration to this host brings; the logs of `serial_ports` are kept here."""
        return Delivery(
            migration=entry.id,
            spec=entry.offer.spec,
            paths=self._registry.paths(entry.machine),
            parcels=entry.offer.parcels,
            log_cap_bytes=self._registry.log_cap_bytes,
            serial_ports=serial_ports,
            live=not entry.at_rest,
            log_ends=self._log_ends.get(entry.id, entry.log_ends),
            arrived=entry.phase in OWNED,
        )

    def logs_end(self, migration: str, ends: Mapping[int, int]) -> None:
        """Where the logs ended at the source; what comes of them after that is not theirs."""
        self._log_ends[migration] = ends

    def forget(self, migration: str) -> None:
        """It is written down by now, or does not matter any more."""
        self._log_ends.pop(migration, None)

    def _entry(self, caller: Caller, migration: str) -> Entry:
        entry = self._ledger.get(migration)
        if entry.peer != self._peers.asking(caller).name or entry.role != "destination":
            raise NotFound(f"there is no migration {migration!r}", migration=migration)
        return entry

    def _machine(self, entry: Entry) -> Machine | None:
        """The machine that this very migration brings or brought, as long as it is here: another one may have its name by now."""
        machine = self._registry.known(entry.machine)
        return machine if machine is not None and machine.definition.arrived == entry.id and machine.definition.given is None else None
