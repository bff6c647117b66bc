"""The destination's QEMU: it listens, takes the guest in, and waits.

It was launched with `-S -incoming defer`. It is nobody's until its daemon owns the machine: whatever goes wrong before, it is thrown
away, so nothing here is undone. What is made in it is found by its name, so that a daemon that was restarted can go on.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from qmpd.errors import MigrationFailed, QemuRefused
from qmpd.migration import capabilities, tls
from qmpd.migration.addresses import Address, Listening, TcpAddress, UnixAddress, legacy_address, uri
from qmpd.migration.capabilities import Agreed
from qmpd.migration.ports import Bind, bound, port_of
from qmpd.migration.progress import Progress
from qmpd.migration.qemu import HANDED, PREFIX, SINCE_8_2, Qemu, ask_list, ask_map, has_command, run_state
from qmpd.migration.tls import ServerTls
from qmpd.migration.watch import Watch, watching

#: A feature mark (`qmpd.schema`): a QEMU that can say why it failed, in place of exiting.
STAYS: Final = "migrate-incoming.exit-on-error"
#: What it says of an export that has a client.
_IN_USE: Final = "still in use"
#: The source has let go of its copies before its guest is here; what is on its way still takes a moment, through a tunnel longer.
CLIENT_PATIENCE_S: Final = 5.0
CLIENT_AGAIN_S: Final = 0.05

_log = logging.getLogger(__name__)


class Listen(msgspec.Struct, frozen=True, kw_only=True):
    """What the destination waits for. `disks` are the nodes whose content will come; without TLS, listen at a Unix socket only.

    `stays` says whether the emulator has the feature mark STAYS.
    """

    memory: Listening
    disks_at: Listening | None = None
    disks: tuple[str, ...] = ()
    tls: ServerTls | None = None
    agreed: Agreed = Agreed()
    stays: bool = False


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where the destination listens for the memory and for the disks, each exported under the name of its node."""

    memory: Address
    disks_at: Address | None = None
    disks: tuple[str, ...] = ()


async def listen(qemu: Qemu, wanted: Listen) -> Endpoint:
    """Has the destination listen, for one client alone, and returns what the source must know.

    With disks, `receive_disks` first, and `receive_memory` when they are copied: a caller that says nothing keeps a QEMU that waits at
    its migration port from everything else, until it leaves.

    Raises:
        MigrationFailed: no port of the range is free, or this QEMU lacks a capability.
        QemuRefused: no port is free, QEMU does not take the certificates, or a node is none that can be exported.
        Invalid: an address cannot be one.
    """
    disks_at = await receive_disks(qemu, wanted)
    return Endpoint(memory=await receive_memory(qemu, wanted), disks_at=disks_at, disks=wanted.disks)


async def receive_disks(qemu: Qemu, wanted: Listen, bind: Bind = bound) -> Address | None:
    """Sets the destination, and has it listen for disks if there are any, at a port that `bind` has got. Raises as `listen`."""
    if wanted.tls is not None:
        await tls.add(qemu, wanted.tls)
    await capabilities.apply(qemu, capabilities.DESTINATION, wanted.agreed, tls.parameters(wanted.tls))
    return await _export(qemu, wanted, bind) if wanted.disks else None


async def receive_memory(qemu: Qemu, wanted: Listen) -> Address:
    """Has the destination listen for memory and devices. Raises as `listen`."""
    # QEMU looks for a free port itself: from 10.0 on, a destination that found one taken does not listen at another any more.
    await qemu.execute("migrate-incoming", {"uri": uri(wanted.memory), **_manners(wanted)})
    return await _found(qemu, wanted.memory)


@asynccontextmanager
async def receive_from(qemu: Qemu, wanted: Listen, line: socket.socket) -> AsyncIterator[None]:
    """Has the destination take memory and devices from the one connection over which they come: in the block it has that.
    `receive_disks` comes first. Raises as `listen`.
    """
    await qemu.hand(PREFIX, line)
    await qemu.execute("migrate-incoming", {"uri": HANDED, **_manners(wanted)})
    yield


def _manners(wanted: Listen) -> dict[str, object]:
    return {"exit-on-error": False} if wanted.stays else {}


async def _found(qemu: Qemu, memory: Listening) -> Address:
    if isinstance(memory, UnixAddress):
        return memory
    match (await ask_map(qemu, "query-migrate")).get("socket-address"):
        case [{"type": "inet", "port": str(port)}]:
            return TcpAddress(host=memory.host, port=int(port))
    raise MigrationFailed(f"QEMU does not say which port of {memory} it listens at")


async def wait_loaded(qemu: Qemu, report: Callable[[Progress], None] = lambda _progress: None) -> None:
    """Returns when the whole guest is in and its disks are its own: `cont` is all that is missing.

    Waits as long as it takes: the source knows when it is hopeless, and a destination that is told to go is killed.

    Raises:
        MigrationFailed: QEMU could not load it (its words, where it stays to say them), or has ended.
    """
    with watching(qemu) as watch:
        await _until(watch, frozenset({"completed"}), report)
    await end_exports(qemu)
    state = await run_state(qemu)
    if state == "inmigrate":
        raise MigrationFailed("QEMU says that the migration is completed, and has not loaded the guest")


async def wait_postcopy(qemu: Qemu) -> None:
    """Returns when the guest can be set going here while the rest of its memory is still on its way, or all of it is in.

    Raises what `wait_loaded` raises.
    """
    with watching(qemu) as watch:
        await _until(watch, frozenset({"postcopy-active", "completed"}), lambda _progress: None)
        while await run_state(qemu) == "inmigrate":  # its devices come a moment later
            await watch.wake()
    await end_exports(qemu)


async def recover(qemu: Qemu, at: UnixAddress) -> None:
    """Has a destination whose memory stopped coming (`postcopy-paused`) listen again. Its guest may wait for that with all of QEMU.
    May be repeated, as long as nobody came.

    Raises:
        QemuRefused: it does not wait for that.
    """
    await qemu.execute_oob("migrate-recover", {"uri": uri(at)})


async def _until(watch: Watch, wanted: frozenset[str], report: Callable[[Progress], None]) -> None:
    while True:
        status = await watch.next()
        if status in wanted:
            return
        if status == "failed":
            await watch.ask()
            raise MigrationFailed(f"the destination's QEMU could not load the guest: {watch.progress.error or 'it does not say why'}")
        report(watch.progress)


async def end_exports(qemu: Qemu) -> None:
    """Takes the disks back from the network; the source has let go of them. Does nothing where that was done before.

    A QEMU before 8.2 keeps its NBD server, without a disk in it, as long as it lives: `nbd-server-stop` waits for callers that have not
    said who they are, and with its whole main loop, so that it never hears them.

    A client that is connected still is one that is about to leave, whose connection takes a moment longer through a tunnel, or nobody who
    has any business here: it is waited for, and then its connection is cut. The source's copies are complete.
    """
    exports = [str(item.get("id")) for item in await ask_list(qemu, "query-block-exports")]
    ours = [name for name in exports if name.startswith(PREFIX)]
    for name in ours:
        await _end_export(qemu, name)
    if ours and len(ours) == len(exports) and await has_command(qemu, SINCE_8_2):
        await qemu.execute("nbd-server-stop")


async def _end_export(qemu: Qemu, name: str) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + CLIENT_PATIENCE_S
    while True:
        try:
            await qemu.execute("block-export-del", {"id": name})
        except QemuRefused as error:
            if _IN_USE not in error.message:
                raise
        else:
            return
        if loop.time() > until:
            break
        await asyncio.sleep(CLIENT_AGAIN_S)
    _log.warning("a client of a disk that has arrived does not leave and is cut off", extra={"export": name})
    await qemu.execute("block-export-del", {"id": name, "mode": "hard"})
    until = loop.time() + CLIENT_PATIENCE_S
    while name in {str(item.get("id")) for item in await ask_list(qemu, "query-block-exports")}:
        if loop.time() > until:
            raise MigrationFailed(f"QEMU does not end its export {name}")
        await asyncio.sleep(CLIENT_AGAIN_S)


async def settle(qemu: Qemu, before: capabilities.Dials) -> None:
    """After the guest was set going here: no credentials, capabilities or parameters of the migration are left.

    `before` is how it was set when it was launched (`capabilities.read`).
    """
    await end_exports(qemu)
    await capabilities.restore(qemu, before)
    await tls.remove(qemu)


async def _export(qemu: Qemu, wanted: Listen, bind: Bind) -> Address:
    if wanted.disks_at is None:
        raise MigrationFailed("disks are to be received, and there is no address to receive them at")
    protection: Mapping[str, object] = {} if wanted.tls is None else {"tls-creds": tls.CREDENTIALS, "tls-authz": tls.AUTHORIZATION}

    found = await _serve(qemu, wanted.disks_at, protection, bind)
    for node in wanted.disks:
        export = {"type": "nbd", "id": f"{PREFIX}-{node}", "node-name": node, "name": node, "writable": True}
        await qemu.execute("block-export-add", export)
    return found


async def _serve(qemu: Qemu, listening: Listening, protection: Mapping[str, object], bind: Bind) -> Address:
    # Not limited to one connection for each disk: a caller that says nothing would take the place of the one that is awaited.
    if isinstance(listening, UnixAddress):
        await qemu.execute("nbd-server-start", {"addr": legacy_address(listening), **protection})
        return listening
    with await bind(listening) as listener:
        await qemu.hand(PREFIX, listener)
        await qemu.execute("nbd-server-start", {"addr": {"type": "fd", "data": {"str": PREFIX}}, **protection})
        return TcpAddress(host=listening.host, port=port_of(listener))
