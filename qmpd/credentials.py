"""The files of QEMU's own TLS between two daemons, and the name of the one peer that it admits.

Migration and NBD connections are made by QEMU itself, with the same certificates as the API's (`qmpd.migration.tls`). QEMU looks at the
revocation list only where it waits. Where it connects, ask the peer over the API first: that looks at both.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from qmpd.errors import HostError
from qmpd.facts import version_numbers
from qmpd.pki import ORGANIZATION
from qmpd.settings import Peer

_ROLE: Final = "peer"
#: An older QEMU that waits makes parameters for a Diffie-Hellman of TLS 1.2 by itself: a search for a prime, by chance 0.1 to 1.5 s, in
#: which it does nothing else, though TLS 1.3 has no use for them. Given some it does not; later ones say that they are deprecated.
MAKES_NONE_SINCE: Final = (10, 2)
PARAMETERS: Final = "dh-params.pem"
#: The group ffdhe2048 of RFC 7919, appendix A.1, as PKCS #3 has it.
FFDHE2048: Final = """\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""


def directory(pki_dir: str) -> str:
    """The directory for QEMU's `tls-creds-x509`, whose files are there and can be read by this user, as which QEMU runs. Blocks.

    Raises:
        HostError: one is missing or cannot be read.
    """
    for name in _files():
        if not os.access(Path(pki_dir) / name, os.R_OK):
            raise HostError(f"{pki_dir}/{name} is missing or cannot be read: see qmpd pki check")
    return pki_dir


@asynccontextmanager
async def server_directory(pki_dir: str, beside: str, version: str) -> AsyncIterator[str]:
    """The same for a QEMU of this version that waits; it has read the files when it has made its object, which ends the block.

    Where it needs parameters it gets a directory of its own, below `beside`. Raises HostError.
    """
    found = await asyncio.to_thread(directory, pki_dir)
    if version_numbers(version) >= MAKES_NONE_SINCE:
        yield found
        return
    made = await asyncio.to_thread(_with_parameters, found, beside)
    try:
        yield made
    finally:
        await asyncio.to_thread(shutil.rmtree, made, ignore_errors=True)


def _with_parameters(pki_dir: str, beside: str) -> str:
    try:
        made = Path(tempfile.mkdtemp(prefix="tls-", dir=beside))
        for name in _files():
            (made / name).symlink_to(Path(pki_dir).absolute() / name)
        # Where somebody made his own, they are as good.
        own = Path(pki_dir).absolute() / PARAMETERS
        (made / PARAMETERS).symlink_to(own) if own.exists() else (made / PARAMETERS).write_text(FFDHE2048, encoding="ascii")
    except OSError as error:
        raise HostError(f"a directory of certificates cannot be made in {beside}: {error.strerror}") from error
    return str(made)


def _files() -> tuple[str, ...]:
    from qmpd.pki.directory import AUTHORITY, CLIENT, REVOKED, SERVER  # here: a library of cryptography comes with it

    return (AUTHORITY, REVOKED, *SERVER, *CLIENT)


def distinguished_name(peer: Peer) -> str:
    """The name of a peer's certificate as QEMU compares it, in the order in which it is encoded. Nothing in it needs escapes."""
    return f"O={ORGANIZATION},OU={_ROLE},CN={peer.owner}"
