"""The other daemons that machines are moved to and from: who they are, and what each may do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from qmpd.access import Caller
from qmpd.errors import Forbidden, NotFound
from qmpd.migration.likeness import DestinationFacts
from qmpd.migration.parcels import History, HistoryTaken, ItemStanding
from qmpd.migration.protocol import Acceptance, Channel, DiscardRequest, Endpoint, Handover, Landed, LoadedRequest, Offer, Standing
from qmpd.peerviews import PeerCertificate, PeerGreeting, RevocationView
from qmpd.settings import Peer


class Peers:
    """The peers that the settings name. Whoever is not among them is nobody, whatever certificate it has."""

    def __init__(self, configured: Sequence[Peer] = ()) -> None:
        self._by_name = {peer.name: peer for peer in configured}
        self._by_owner = {peer.owner: peer for peer in configured}

    def __iter__(self) -> Iterator[Peer]:
        """All of them, by name."""
        return iter(sorted(self._by_name.values(), key=lambda peer: peer.name))

    def get(self, name: str) -> Peer:
        """The peer of this name. Raises NotFound."""
        try:
            return self._by_name[name]
        except KeyError:
            raise NotFound(f"there is no peer {name!r}", peer=name) from None

    def owned_by(self, owner: str) -> Peer | None:
        """The peer that has a certificate of this name; None if there is none."""
        return self._by_owner.get(owner)

    def sender(self, caller: Caller) -> Peer:
        """The peer that makes a request, which wants to send a machine here. Raises Forbidden where it may not."""
        peer = self.asking(caller)
        if not peer.may_send:
            raise Forbidden(f"{peer.name} may not send machines here: the settings say may_send = false", peer=peer.name)
        return peer

    def receiver(self, name: str) -> Peer:
        """The peer of this name, which is to get a machine. Raises NotFound, and Forbidden where it may not."""
        peer = self.get(name)
        if not peer.may_receive:
            raise Forbidden(f"{name} may not receive machines of this daemon: the settings say may_receive = false", peer=name)
        return peer

    def asking(self, caller: Caller) -> Peer:
        """The peer that makes a request. Raises Forbidden where it is none."""
        if caller.peer is None:
            raise Forbidden(f"{caller.user or 'this caller'} is no peer of this daemon")
        return self.get(caller.peer)


class Stream(Protocol):
    """One connection of QEMU's on its way between two daemons, in pieces. An empty one says that nothing more comes from that side.

    Each method raises ConnectionError when the stream is broken.
    """

    async def send(self, data: bytes) -> None:
        """Gives a piece to the other side; waits as long as that has no room for it."""

    async def receive(self) -> bytes:
        """The next piece of the other side."""


class PeerDaemon(Protocol):
    """What is asked of another daemon, over a connection on which both sides have shown who they are.

    Each method raises PeerUnavailable, PeerRefused or PeerSilent (`qmpd.errors`).
    """

    @property
    def shown(self) -> PeerCertificate | None:
        """The certificate it showed last; None before the first answer."""

    async def greeting(self) -> PeerGreeting:
        """What it says of itself, and of us."""

    async def revoked(self) -> RevocationView:
        """What its authority revoked, as far as it knows."""

    # To move a machine: every question may be repeated, and what has no answer has to be.

    async def offer(self, offer: Offer) -> Acceptance:
        """Has it get ready for a machine."""

    async def tried(self, offer: Offer) -> DestinationFacts:
        """What it has for a machine, and what a QEMU with its definition would be made of there. Nothing is left of it there."""

    async def carried(self, freight: bytes) -> Landed:
        """Bytes that it throws away."""

    async def loaded(self, migration: str, request: LoadedRequest) -> Standing:
        """How far it is, when it has the whole state or the time is over."""

    async def take(self, migration: str, handover: Handover) -> Standing:
        """Tells it that it owns the machine."""

    async def recover(self, migration: str) -> Endpoint:
        """Has it listen again for memory that follows a guest there."""

    async def discard(self, migration: str, request: DiscardRequest) -> Standing:
        """Tells it that it will never own the machine by this migration."""

    async def standing(self, migration: str) -> Standing:
        """How far it is."""

    def tunnel(self, migration: str, channel: Channel) -> AbstractAsyncContextManager[Stream]:
        """A stream to where its QEMU waits for this."""

    # What belongs to a machine, and what happened to it.

    async def item(self, migration: str, item: str) -> ItemStanding:
        """How much of an item it has."""

    async def put_item(self, migration: str, item: str, offset: int, data: bytes) -> ItemStanding:
        """Hands in a piece of an item."""

    async def tell_history(self, migration: str, history: History) -> HistoryTaken:
        """Tells what happened to a machine that is there now."""


#: A connection to a peer for as long as the block runs; nothing is sent before the first question. Raises HostError without certificates.
Dial = Callable[[Peer], AbstractAsyncContextManager[PeerDaemon]]
