"""TLS as qmpd uses it, on both sides: version 1.3 and nothing else, one authority, and what it revoked."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Final

from qmpd.errors import HostError
from qmpd.pki.directory import AUTHORITY, CLIENT, REVOKED, SERVER, Pki

#: The only protocol that is spoken over a TLS connection (ALPN).
PROTOCOL: Final = "http/1.1"


def server_context(pki: Pki) -> ssl.SSLContext:
    """For a listener: a client may show a certificate of the authority, and need not if it has a token; a wrong one ends the handshake.

    Raises:
        HostError: a file is missing or cannot be used. Blocks.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_OPTIONAL
    return _completed(context, pki, SERVER)


def client_context(pki: Pki) -> ssl.SSLContext:
    """For a connection to another daemon: its certificate must be of the authority, and carry the name it is reached under. Blocks.

    Raises:
        HostError: a file is missing or cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return _completed(context, pki, CLIENT)


def anonymous_context(pki: Pki) -> ssl.SSLContext:
    """The same for who shows no certificate but a token. Blocks. Raises HostError."""
    return _completed(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), pki, None)


def pinned(context: ssl.SSLContext, check: Callable[[bytes], None]) -> ssl.SSLContext:
    """The same context, whose handshakes end well only if `check` takes the certificate (DER) of the other side as well.

    `check` raises ssl.SSLCertVerificationError; nothing but the handshake has been sent by then.
    """

    class Checked(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            check(self.getpeercert(binary_form=True) or b"")

    context.sslobject_class = Checked
    return context


def _completed(context: ssl.SSLContext, pki: Pki, own: tuple[str, str] | None) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([PROTOCOL])
    context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF | ssl.VERIFY_X509_STRICT
    try:
        if own is not None:
            certificate, key = own
            context.load_cert_chain(str(pki.directory / certificate), str(pki.directory / key))
        for name in (AUTHORITY, REVOKED):
            context.load_verify_locations(str(pki.directory / name))
    except (OSError, ssl.SSLError) as error:
        raise HostError(f"the certificates in {pki.directory} cannot be used ({error.strerror or error}): see qmpd pki check") from error
    return context
