"""The certificates of the two ends of a migration, as objects in QEMU, for its memory and its disks alike.

A destination admits exactly one distinguished name; a source believes exactly one host name. Both come from what the daemons know of
each other, not from the connection.
"""

from __future__ import annotations

from typing import Final

import msgspec

from qmpd.migration.qemu import PREFIX, Qemu, ask_list

CREDENTIALS: Final = f"{PREFIX}-tls"
AUTHORIZATION: Final = f"{PREFIX}-authz"
#: TLS 1.3 alone, as on the API: both ends are QEMUs whose GnuTLS has it.
PRIORITY: Final = "NORMAL:-VERS-ALL:+VERS-TLS1.3"


class ServerTls(msgspec.Struct, frozen=True, kw_only=True):
    """A destination's: the directory of its certificate (`qmpd.pki.directory`), and the subject of the one client that is admitted."""

    directory: str
    admits: str


class ClientTls(msgspec.Struct, frozen=True, kw_only=True):
    """A source's: the directory of its certificate, and the name that the destination's must bear."""

    directory: str
    hostname: str


def subject(name: str) -> str:
    """The distinguished name of a peer's certificate (`qmpd.pki.certificates`), as GnuTLS prints it for QEMU to compare."""
    return f"O=qmpd,OU=peer,CN={name}"


async def add(qemu: Qemu, tls: ServerTls | ClientTls) -> None:
    """Makes the objects, in place of what an earlier migration left. Raises QemuRefused for certificates that QEMU does not take."""
    await remove(qemu)
    creds = {"qom-type": "tls-creds-x509", "id": CREDENTIALS, "dir": tls.directory, "verify-peer": True, "priority": PRIORITY}
    if isinstance(tls, ServerTls):
        await qemu.execute("object-add", {"qom-type": "authz-simple", "id": AUTHORIZATION, "identity": tls.admits})
    await qemu.execute("object-add", {**creds, "endpoint": "server" if isinstance(tls, ServerTls) else "client"})


async def remove(qemu: Qemu) -> None:
    """Removes the objects, where they are."""
    there = {str(item.get("name")) for item in await ask_list(qemu, "qom-list", {"path": "/objects"})}
    for name in (CREDENTIALS, AUTHORIZATION):
        if name in there:
            await qemu.execute("object-del", {"id": name})


def parameters(tls: ServerTls | ClientTls | None) -> dict[str, object]:
    """The parameters of a migration that goes through these credentials, or through none."""
    match tls:
        case ServerTls():
            return {"tls-creds": CREDENTIALS, "tls-authz": AUTHORIZATION}
        case ClientTls():
            return {"tls-creds": CREDENTIALS, "tls-hostname": tls.hostname}
        case None:
            return {"tls-creds": "", "tls-hostname": "", "tls-authz": ""}
