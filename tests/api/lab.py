"""Daemons that know each other: each with an authority's certificate, directories and a port of the loopback of its own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path

import msgspec

from qmpd.daemon import running
from qmpd.peers import Peers
from qmpd.peerviews import PeerHealth
from qmpd.pki.certificates import KeyPair
from qmpd.pki.directory import Pki
from qmpd.service import Service
from qmpd.settings import Peer, Settings, user_defaults
from qmpd.trust import loaded
from qmpd_api.application import create
from qmpd_api.dialling import PeerClient, dialled
from qmpd_api.identity import TRUST
from qmpd_api.limits import Limits
from qmpd_api.server import answering
from tests.conftest import CACHE

LOOPBACK = "127.0.0.1"


class Daemon:
    """One of them, running."""

    def __init__(self, name: str, service: Service, pki: Pki, port: int) -> None:
        self.name = name
        self.service = service
        self.pki = pki
        self.port = port

    async def health(self, peer: str) -> PeerHealth:
        """What it says of a peer."""
        return await self.service.peering.health(peer)


@contextmanager
def port() -> Iterator[tuple[socket.socket, int]]:
    """A listening socket of the loopback, and its port: known before anybody's settings name it."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        yield listener, int(listener.getsockname()[1])


@contextmanager
def reserved() -> Iterator[int]:
    """A port of the loopback at which one may listen (with SO_REUSEADDR, as daemons and QEMU do) again and again while the block lasts.

    A socket has it that does not listen: so the kernel gives it to nobody who asks for any port.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((LOOPBACK, 0))
        yield int(held.getsockname()[1])


def authority(directory: Path) -> Pki:
    """A new authority. Blocks."""
    made = Pki(directory)
    made.init("lab")
    return made


def host(authority: Pki, directory: Path, name: str, pair: KeyPair | None = None) -> Pki:
    """The certificates of a host that is called `name` and reached at the loopback. Blocks."""
    authority.store(directory, authority.issue(name, "peer", (LOOPBACK,)) if pair is None else pair)
    return Pki(directory)


def peer(name: str, port: int, **grants: bool) -> Peer:
    """A peer on the loopback."""
    return msgspec.structs.replace(Peer(name=name, url=f"https://{LOOPBACK}:{port}"), **grants)


def settings(directory: Path, pki: Pki, peers: Sequence[Peer], emulators: Sequence[str] = ()) -> Settings:
    """Those of a daemon that has nothing but its own directory."""
    defaults = user_defaults("tester", str(directory), {})
    places = {"socket": f"{directory}/api.sock", "state_dir": f"{directory}/s", "run_dir": f"{directory}/r", "cache_dir": str(CACHE)}
    return msgspec.structs.replace(defaults, **places, pki_dir=str(pki.directory), peers=tuple(peers), emulators=tuple(emulators))


@asynccontextmanager
async def daemon(
    name: str,
    directory: Path,
    pki: Pki,
    listener: socket.socket,
    peers: Sequence[Peer] = (),
    limits: Limits | None = None,
    emulators: Sequence[str] = (),
    awaiting: Sequence[socket.socket] = (),
) -> AsyncIterator[Daemon]:
    """A daemon that answers over TLS on `listener`, and awaits machines at `awaiting` if there are any."""

    def dial(there: Peer) -> AbstractAsyncContextManager[PeerClient]:
        return dialled(there, str(pki.directory))

    async with running(settings(directory, pki, peers, emulators), {}, dial, awaiting) as service:
        trust = await asyncio.to_thread(loaded, str(pki.directory), service.peering.peers)
        app = create(service, limits or Limits(shutdown_s=0.1), names=trust.names)
        app[TRUST] = trust
        async with answering(app, [listener], security=trust.server):
            yield Daemon(name, service, pki, int(listener.getsockname()[1]))


def known(*peers: Peer) -> Peers:
    """These, looked up."""
    return Peers(peers)
