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
    """A destination's: the directory of its certificate (`qmpd.credentials`), and the subject of the one client that is admitted."""

    directory: str
    admits: str


class ClientTls(msgspec.Struct, frozen=True, kw_only=True):
    """A source's: the directory of its certificate, and the name that the destination's must bear."""

    directory: str
    hostname: str


async def add(qemu: Qemu, tls: ServerTls | ClientTls) -> None:
    """Makes the objects, in place of what an earlier migration left. Raises QemuRefused for certificates that QEMU does not take."""
    await remove(qemu)
    for made in objects(tls):
        await qemu.execute("object-add", made)


def objects(tls: ServerTls | ClientTls) -> tuple[dict[str, object], ...]:
    """The arguments of `object-add` for each. The other side must show a certificate too."""
    creds = {"qom-type": "tls-creds-x509", "id": CREDENTIALS, "dir": tls.directory, "verify-peer": True, "priority": PRIORITY}
    match tls:
        case ServerTls():
            admission: dict[str, object] = {"qom-type": "authz-simple", "id": AUTHORIZATION, "identity": tls.admits}
            return (admission, {**creds, "endpoint": "server"})
        case ClientTls():
            return ({**creds, "endpoint": "client"},)


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
