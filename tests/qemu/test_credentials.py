"""QEMU's own TLS with the certificates of daemons: two real QEMUs, and a machine that goes from one to the other, or not."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from qmpd.access import Role
from qmpd.credentials import PARAMETERS, directory, distinguished_name, server_directory
from qmpd.migration.tls import ClientTls, ServerTls, objects, parameters
from qmpd.pki.directory import AUTHORITY, CLIENT, REVOKED, Pki
from qmpd.settings import Peer
from tests.qemu.byhand import PATIENCE_S, emulator

pytestmark = pytest.mark.qemu

LOOPBACK: Final = "127.0.0.1"
#: Which needs parameters for certificates.
OLDEST: Final = "7.2.0"
MACHINE: Final = ("-nodefaults", "-no-user-config", "-machine", "q35", "-accel", "tcg", "-m", "16", "-display", "none", "-S")
SOURCE: Final = Peer(name="a", url=f"https://{LOOPBACK}:1")
TARGET: Final = Peer(name="b", url=f"https://{LOOPBACK}:1")


class Qemu:
    """One QEMU and its monitor."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, process: asyncio.subprocess.Process) -> None:
        self._reader = reader
        self._writer = writer
        self.process = process

    async def __call__(self, command: str, **arguments: object) -> Any:
        """The answer to a command, which must not be an error."""
        self._writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        async with asyncio.timeout(PATIENCE_S):
            while True:
                line = await self._reader.readline()
                assert line, f"QEMU ended during {command}: {await self.said()}"
                answer = json.loads(line)
                if "return" in answer or "error" in answer:
                    assert "return" in answer, answer
                    return answer["return"]

    async def until(self, field: str, *values: str) -> str:
        """The state of the migration, once it is one of these."""
        async with asyncio.timeout(PATIENCE_S):
            while (found := (await self("query-migrate")).get(field)) not in values:
                await asyncio.sleep(0.02)
            return str(found)

    async def said(self) -> str:
        """Its standard error, which ends it."""
        if self.process.returncode is None:
            self.process.kill()
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()


@asynccontextmanager
async def qemu(*further: str) -> AsyncIterator[Qemu]:
    """A QEMU with the smallest machine, halted; ended with the block."""
    ours, its = socket.socketpair()
    with its:
        process = await asyncio.create_subprocess_exec(
            emulator(), *MACHINE, "-chardev", f"socket,id=m,fd={its.fileno()}", "-mon", "chardev=m,mode=control", *further,
            pass_fds=[its.fileno()], stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
    reader, writer = await asyncio.open_connection(sock=ours)
    try:
        await reader.readline()
        made = Qemu(reader, writer, process)
        await made("qmp_capabilities")
        yield made
    finally:
        writer.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


class Lab:
    """An authority, and who has what of it."""

    def __init__(self, place: Path) -> None:
        self.authority = Pki(place / "ca")
        self.authority.init("lab")
        self.place = place
        for peer in (SOURCE, TARGET):
            self.holder(peer.name)

    def directory(self, name: str) -> str:
        return directory(str(self.place / name))

    def holder(self, name: str, role: Role = "peer", *, of: Pki | None = None, place: str | None = None) -> str:
        """A directory with the certificate of somebody, who trusts this authority as well as that which signed the certificate."""
        where, signer = self.place / (place or name), of or self.authority
        signer.store(where, signer.issue(name, role, (LOOPBACK,) if role == "peer" else ()))
        both = dict.fromkeys((signer.read(AUTHORITY) or b"", self.authority.read(AUTHORITY) or b""))
        (where / AUTHORITY).write_bytes(b"".join(both))
        return str(where)

    def foreign(self) -> str:
        other = Pki(self.place / "other")
        other.init("lab")
        return self.holder("a", of=other, place="foreign")

    def revoked(self) -> str:
        self.authority.revoke("a")
        for place in ("a", "b"):
            (self.place / place / REVOKED).write_bytes(self.authority.read(REVOKED) or b"")
        return self.directory("a")


@pytest.fixture
async def lab(short_directory: Path) -> Lab:
    return await asyncio.to_thread(Lab, short_directory)


async def shows(one: Qemu, tls: ServerTls | ClientTls) -> None:
    """Has a QEMU migrate with these credentials."""
    for made in objects(tls):
        await one("object-add", **made)
    await one("migrate-set-parameters", **parameters(tls))


@asynccontextmanager
async def awaited(lab: Lab) -> AsyncIterator[tuple[Qemu, int]]:
    """A QEMU that waits for a machine of SOURCE and nobody else's, as TARGET, and on which port."""
    async with qemu("-incoming", "defer") as there:
        async with server_directory(lab.directory("b"), str(lab.place), OLDEST) as made:
            await shows(there, ServerTls(directory=made, admits=distinguished_name(SOURCE)))
        await there("migrate-incoming", uri=f"tcp:{LOOPBACK}:0")
        (where,) = (await there("query-migrate"))["socket-address"]
        yield there, int(where["port"])


async def send(here: Qemu, port: int, pki_dir: str | None, name: str = TARGET.owner) -> str:
    """Sends the machine and returns how that ended."""
    if pki_dir is not None:
        await shows(here, ClientTls(directory=pki_dir, hostname=name))
    await here("migrate", uri=f"tcp:{LOOPBACK}:{port}")
    return await here.until("status", "completed", "failed")


async def test_a_machine_goes_to_the_peer_that_was_meant(lab: Lab) -> None:
    async with awaited(lab) as (there, port), qemu() as here:
        assert await send(here, port, lab.directory("a")) == "completed"
        assert await there.until("status", "completed") == "completed"


async def client_of_a_person(lab: Lab) -> str:
    return await asyncio.to_thread(lab.holder, "a", "admin", place="ada")


async def another_peer(lab: Lab) -> str:
    return await asyncio.to_thread(lab.holder, "c")


async def foreign(lab: Lab) -> str:
    return await asyncio.to_thread(lab.foreign)


async def revoked(lab: Lab) -> str:
    return await asyncio.to_thread(lab.revoked)


async def without_a_certificate(lab: Lab) -> str:
    place = await another_peer(lab)
    for name in CLIENT:
        await asyncio.to_thread((Path(place) / name).unlink)
    return place


async def without_tls(_lab: Lab) -> None:
    return None


@pytest.mark.parametrize("who", [client_of_a_person, another_peer, foreign, revoked, without_a_certificate, without_tls])
async def test_nobody_else_is_let_in_and_the_peer_may_still_come(lab: Lab, who: Callable[[Lab], Awaitable[str | None]]) -> None:
    place = await who(lab)
    async with awaited(lab) as (there, port):
        async with qemu() as stranger:
            # Without a way back the stranger's QEMU takes what nobody reads for a success, where there is no TLS.
            await stranger("migrate-set-capabilities", capabilities=[{"capability": "return-path", "state": True}])
            assert await send(stranger, port, place) == "failed"
        assert (await there("query-status"))["status"] == "inmigrate"
        if who is not revoked:
            async with qemu() as here:
                assert await send(here, port, lab.directory("a")) == "completed"
            assert await there.until("status", "completed") == "completed"


async def test_a_machine_does_not_go_to_another_peer_or_a_stranger(lab: Lab) -> None:
    """The address is right, and so is the authority: only the name is not. Who waits has let its peer in, and sees it go."""
    for name in ("c", "b.example"):
        async with awaited(lab) as (there, port), qemu() as here:
            assert await send(here, port, lab.directory("a"), name) == "failed"
            assert (await here("query-status"))["status"] == "prelaunch"
            async with asyncio.timeout(PATIENCE_S):
                assert await there.process.wait() == 1
            assert "Not a migration stream" in await there.said()


async def test_a_machine_does_not_go_to_one_of_another_authority(lab: Lab) -> None:
    other = Pki(Path(lab.directory("b")).parent / "others")
    await asyncio.to_thread(other.init, "lab")
    place = await asyncio.to_thread(lab.holder, "b", of=other, place="b2")
    async with qemu("-incoming", "defer") as there, qemu() as here:
        await shows(there, ServerTls(directory=directory(place), admits=distinguished_name(SOURCE)))
        await there("migrate-incoming", uri=f"tcp:{LOOPBACK}:0")
        (where,) = (await there("query-migrate"))["socket-address"]
        assert await send(here, int(where["port"]), lab.directory("a")) == "failed"


async def test_a_qemu_that_waits_is_given_parameters_that_it_would_search_for(lab: Lab, short_directory: Path) -> None:
    """It reads them (where they are damaged it says so), a machine goes to it, and nothing is left of the directory."""
    pki_dir = lab.directory("b")
    async with awaited(lab) as (there, port), qemu() as here:
        assert await send(here, port, lab.directory("a")) == "completed"
        assert await there.until("status", "completed") == "completed"
    await asyncio.to_thread((Path(pki_dir) / PARAMETERS).write_text, "damaged")
    async with qemu() as there, server_directory(pki_dir, str(short_directory), OLDEST) as made:
        with pytest.raises(AssertionError, match="DH parameters"):
            await shows(there, ServerTls(directory=made, admits=distinguished_name(SOURCE)))
    assert not await asyncio.to_thread(lambda: list(short_directory.glob("tls-*")))
