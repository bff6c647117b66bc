"""Joining from another host: a key is made here and stays here; what is sent is a request to certify it, and the token.

The token is sent only over TLS 1.3 to the daemon whose certificate has the fingerprint in it. No authority is known yet, so nothing
else of that certificate counts until the answer is there; then it must be one of the authority that the answer brings. Blocks.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import re
import ssl
from typing import Final

import msgspec

from qmpd.errors import AlreadyExists, HostError, Problem, QmpdError, Unauthorized, invalid
from qmpd.peerviews import JoinAnswer, JoinRequest
from qmpd.pki import certificates
from qmpd.pki.certificates import CertificateFacts, KeyPair, Unreadable
from qmpd.pki.context import PROTOCOL
from qmpd.pki.directory import AUTHORITY, AUTHORITY_KEY, Pki
from qmpd.pki.invitations import told
from qmpd.views import ErrorBody

PATH: Final = "/v1/pki/join"
#: Three round trips and a signature; for each of them a host that swaps may need seconds.
STEP_S: Final = 30.0
#: A certificate, the authority's and its list: with tens of thousands of revocations still less.
ANSWER_BYTES: Final = 4 * 1024 * 1024
#: What the request calls its sender: nobody reads it, the invitation says who it is.
REQUEST_NAME: Final = "request"
_URL: Final = re.compile(r"https://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})/?")


def join(pki: Pki, url: str, token: str) -> CertificateFacts:
    """Gets a certificate and puts it, its key and the authority's certificate and list into the directory.

    Raises:
        Invalid: the token or the URL is none.
        AlreadyExists: the directory is that of an authority, or trusts another one.
        HostError: the daemon cannot be reached, or is not the one that the token was made for. The token was not sent.
        Unauthorized: the daemon does not take the token.
        QmpdError: what came back is not what was asked for.
    """
    match, parts = _URL.fullmatch(url), told(token)
    if match is None or not 0 < int(match["port"]) < 65_536:
        raise invalid([Problem(path="url", message=f"must be like https://host:8443, not {url[:100]!r}")])
    if pki.read(AUTHORITY_KEY) is not None:
        raise AlreadyExists(f"{pki.directory} is that of an authority; it issues its own certificates")
    pki.prepare()  # before the token is spent
    made = certificates.new_request(REQUEST_NAME)
    connection = http.client.HTTPSConnection(match["host"].strip("[]"), int(match["port"]), timeout=STEP_S, context=_context())
    try:
        server = ssl.DER_cert_to_PEM_cert(_connected(connection, parts.fingerprint)).encode()
        known = pki.read(AUTHORITY)
        if known is not None and not certificates.issued_by(server, known):
            raise AlreadyExists(f"{pki.directory} trusts another authority already; move it away first")
        answer = _asked(connection, JoinRequest(token=token.strip(), request=made.certificate.decode()))
    except (OSError, http.client.HTTPException) as error:
        raise HostError(f"{url} cannot be joined: {error}") from error
    finally:
        connection.close()
    return _taken(pki, made.key, answer, server)


def _context() -> ssl.SSLContext:
    """No authority is known: `_connected` looks at the certificate instead."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([PROTOCOL])
    return context


def _connected(connection: http.client.HTTPSConnection, fingerprint: str) -> bytes:
    """Connects, and returns the certificate (DER) of the other side, which is the one that was pinned. Nothing else was sent by then."""
    connection.connect()
    shown = connection.sock.getpeercert(binary_form=True) if isinstance(connection.sock, ssl.SSLSocket) else None
    if shown is None or not hmac.compare_digest(hashlib.sha256(shown).hexdigest().encode(), fingerprint.lower().encode()):
        message = "it shows another certificate than the token was made for: somebody is in between, or it was renewed since"
        raise HostError(f"{connection.host}:{connection.port} is not trusted, and was told nothing: {message}")
    return shown


def _asked(connection: http.client.HTTPSConnection, request: JoinRequest) -> JoinAnswer:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    connection.request("POST", PATH, body=msgspec.json.encode(request), headers=headers)
    response = connection.getresponse()
    body = response.read(ANSWER_BYTES + 1)
    try:
        if response.status == http.client.OK and len(body) <= ANSWER_BYTES:
            return msgspec.json.decode(body, type=JoinAnswer)
        refused = msgspec.json.decode(body, type=ErrorBody)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise QmpdError(f"the daemon answered {response.status} and nothing that can be understood") from error
    kind = Unauthorized if response.status == http.client.UNAUTHORIZED else QmpdError
    raise kind(f"the daemon answered: {refused.message}")


def _taken(pki: Pki, key: bytes, answer: JoinAnswer, server: bytes) -> CertificateFacts:
    made = KeyPair(certificate=answer.certificate.encode(), key=key)
    authority = answer.authority.encode()
    try:
        facts = certificates.describe(made.certificate)
        if not certificates.issued_by(server, authority):
            raise QmpdError("the daemon's own certificate is not of the authority that it names")
        certificates.describe_list(answer.revoked.encode(), authority)
        pki.take(made, authority, answer.revoked.encode())
    except Unreadable as error:
        raise QmpdError(f"the daemon's answer is damaged: {error}") from error
    return facts
