"""QEMU's own TLS between two daemons: the files it reads, and the one peer it admits.

Migration and NBD connections are made by QEMU itself, with the same certificates as the API's. Each side names the other:

    who waits     `credentials(..., "server")`, and `tls-authz` with the `admission` of the peer: its distinguished name, and no other
    who connects  `credentials(..., "client")`, and as `tls-hostname` the peer's `owner`, a name that only its certificate carries

QEMU looks at the revocation list only where it waits. Where it connects, ask the peer over the API first: that looks at both.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

from qmpd.errors import HostError
from qmpd.pki import ORGANIZATION
from qmpd.settings import Peer

Endpoint = Literal["server", "client"]
_ROLE: Final = "peer"


def directory(pki_dir: str) -> str:
    """The directory for QEMU's `tls-creds-x509`, whose files are there and can be read by this user, as which QEMU runs. Blocks.

    Raises:
        HostError: one is missing or cannot be read.
    """
    from qmpd.pki.directory import AUTHORITY, CLIENT, REVOKED, SERVER  # here: a library of cryptography comes with it

    for name in (AUTHORITY, REVOKED, *SERVER, *CLIENT):
        if not os.access(Path(pki_dir) / name, os.R_OK):
            raise HostError(f"{pki_dir}/{name} is missing or cannot be read: see qmpd pki check")
    return pki_dir


def credentials(identifier: str, pki_dir: str, endpoint: Endpoint) -> dict[str, object]:
    """The arguments of `object-add` (or of `-object`) for the credentials. The other side must show a certificate too."""
    return {"qom-type": "tls-creds-x509", "id": identifier, "dir": pki_dir, "endpoint": endpoint, "verify-peer": True}


def admission(identifier: str, peer: Peer) -> dict[str, object]:
    """The arguments of `object-add` for what `tls-authz` names: only this peer may connect."""
    return {"qom-type": "authz-simple", "id": identifier, "identity": distinguished_name(peer)}


def distinguished_name(peer: Peer) -> str:
    """The name of a peer's certificate as QEMU compares it, in the order in which it is encoded. Nothing in it needs escapes."""
    return f"O={ORGANIZATION},OU={_ROLE},CN={peer.owner}"
