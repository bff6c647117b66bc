"""Places for machines of peers: how many may be on their way here at the same time, and when none may.

Each machine that is awaited is a QEMU with the memory that its peer asks for, two ports, and room for its disks, before anything of it is
here. Nothing is made for one that is refused, and its offer is not written down: the same one may be made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from qmpd.errors import Busy
from qmpd.migration.ledger import Ledger
from qmpd.migration.phases import UNOWNED
from qmpd.migration.protocol import Offer

#: Of all peers together: each takes two ports at most, and `migration_ports` has 64 unless somebody says otherwise.
AWAITED: Final = 32
#: Of one peer: half of that, so that no peer can keep the others out alone.
AWAITED_OF_PEER: Final = 16

#: A machine on its way: its migration, its peer, its UUID.
_Coming = tuple[str, str, str]


class Vacancies:
    """Counts the machines on their way here that are not this host's own yet. `refuse` raises GoingDown while the host goes down."""

    def __init__(self, ledger: Ledger, refuse: Callable[[str], None]) -> None:
        self._ledger = ledger
        self._refuse = refuse
        #: Offers that are looked at, and perhaps not written down yet.
        self._offered: set[_Coming] = set()
        #: The daemon ends: its successor takes them.
        self.closing = False

    @contextmanager
    def taken(self, peer: str, offer: Offer) -> Iterator[None]:
        """A place for what is offered, while the offer is looked at; from then on the ledger says that it is there.

        Raises:
            GoingDown: the host goes down, or did before the block was left: whatever was made for it is to be discarded.
            Busy: there is no place at the moment, or the daemon ends.
        """
        self._check(peer, offer)
        coming = (offer.id, peer, offer.uuid)
        repeated = coming in self._offered
        self._offered.add(coming)
        try:
            yield
        finally:
            if not repeated:
                self._offered.discard(coming)
        self._refuse("taken in")

    def _check(self, peer: str, offer: Offer) -> None:
        self._refuse("taken in")
        if self.closing:
            raise Busy("the daemon ends: its successor takes machines in")
        listed = {(entry.id, entry.peer, entry.uuid) for entry in self._ledger.unsettled("destination") if entry.phase in UNOWNED}
        # The same offer again, and one that takes the place of an older one of the same machine, need no other place.
        others = [theirs for ident, theirs, uuid in self._offered | listed if ident != offer.id and (theirs, uuid) != (peer, offer.uuid)]
        if others.count(peer) >= AWAITED_OF_PEER:
            raise Busy(f"{AWAITED_OF_PEER} machines of {peer} are on their way here, which is the most at a time", limit=AWAITED_OF_PEER)
        if len(others) >= AWAITED:
            raise Busy(f"{AWAITED} machines are on their way here, which is the most at a time", limit=AWAITED)
