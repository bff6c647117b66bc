"""Who else connects to a port: scanners, browsers, and those with the wrong papers or none.

Each is a function of an address that returns when it has done its worst, or a socket that stays open and says nothing.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from qmpd.pki import certificates
from qmpd.pki.certificates import KeyPair
from qmpd.pki.directory import AUTHORITY, AUTHORITY_KEY, CLIENT, Pki

Address = tuple[str, int]
Visit = Callable[[Address], None]

#: Only a hang may fail: whoever is not let in is told at once, or the connection is closed.
PATIENCE_S: Final = 30.0
#: How a plain migration stream begins, a Red Hat one too: QEVM, version 3.
MIGRATION: Final = struct.pack(">II", 0x5145564D, 3)
#: How an NBD client's first words are.
NBD: Final = b"NBDMAGICIHAVEOPT"
GARBAGE_BYTES: Final = 1 << 16
#: Since when an expired certificate is.
LONG_DAYS: Final = 30

WORDS: Final[Mapping[str, bytes]] = {
    "nothing": b"",
    "one byte": b"\x16",
    "a browser's request": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a plain migration": MIGRATION + bytes(64),
    "an NBD client": NBD,
    "garbage": bytes(range(256)) * (GARBAGE_BYTES // 256),
    "half a greeting of TLS": bytes.fromhex("16030100c8010000c40303") + bytes(16),
}


def says(words: bytes) -> Visit:
    """Connects, says this, and leaves."""

    def visit(address: Address) -> None:
        with socket.create_connection(address, PATIENCE_S) as peer, contextlib.suppress(ConnectionError):
            peer.sendall(words)

    return visit


def breaks_off(address: Address) -> None:
    """Connects, and ends the connection with a reset, as a scanner does."""
    with socket.create_connection(address, PATIENCE_S) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def shows(papers: Path | None) -> Visit:
    """Speaks TLS with the certificate in a directory, or with none, then says what a migration says, and wants an answer."""

    def visit(address: Address) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if papers is not None:
            context.load_cert_chain(papers / CLIENT[0], papers / CLIENT[1])
        with socket.create_connection(address, PATIENCE_S) as plain, contextlib.suppress(OSError), context.wrap_socket(plain) as peer:
            peer.sendall(MIGRATION)
            while peer.recv(4096):
                pass

    return visit


def impostors(directory: Path, authority: Pki, peer: str, address: str) -> dict[str, Visit]:
    """Those who speak TLS, with papers that should not get them in where `peer` alone is awaited."""
    others = Pki(directory / "other-authority")
    others.init("others")
    papers = {
        "another authority's certificate": others.issue(peer, "peer", (peer, address)),
        "another host's certificate": authority.issue("elsewhere", "peer", ("elsewhere", address)),
        "a name that begins like the peer's": authority.issue(f"{peer}.example", "peer", (peer, address)),
        "a person's certificate of the peer's name": authority.issue(peer, "admin", ()),
        "an expired certificate": _expired(authority, peer, address),
    }
    made: dict[str, Visit] = {"no certificate": shows(None)}
    for number, (who, pair) in enumerate(papers.items()):
        place = directory / f"impostor{number}"
        place.mkdir()
        (place / CLIENT[0]).write_bytes(pair.certificate)
        (place / CLIENT[1]).write_bytes(pair.key)
        made[who] = shows(place)
    return made


def _expired(authority: Pki, name: str, address: str) -> KeyPair:
    made = certificates.new_request(name)
    issuer = KeyPair(certificate=authority.read(AUTHORITY) or b"", key=authority.read(AUTHORITY_KEY) or b"")
    long_ago = datetime.now(UTC) - timedelta(days=LONG_DAYS)
    signed = certificates.issue(issuer, made.certificate, name=name, role="peer", hosts=(name, address), now=long_ago, days=1)
    return KeyPair(certificate=signed, key=made.key)
