"""Whether the peers answer, asked without a daemon: with this host's certificate, and with everything checked that a daemon checks."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Final

import msgspec

from qmpd.errors import HostError
from qmpd.hostcheck.line import Topic
from qmpd.peerviews import PeerGreeting
from qmpd.pki import ORGANIZATION
from qmpd.pki.certificates import CertificateFacts, Unreadable, describe_der
from qmpd.pki.checking import SOON
from qmpd.pki.context import client_context
from qmpd.pki.directory import Pki
from qmpd.settings import Peer
from qmpd.views import CheckLine, ErrorBody

PATH: Final = "/v1/peer"
#: Two round trips each, and no work.
STEP_S: Final = 5.0
AT_ONCE: Final = 8
#: A greeting is a few hundred bytes.
ANSWER_BYTES: Final = 64 * 1024
#: Certificates are dated back by ten minutes; what is beyond a minute wants mending before that.
CLOCKS_DIFFER_S: Final = 60.0

_PEERS: Final = Topic("Peers")


def ask(pki: Pki, peers: Sequence[Peer], now: datetime) -> list[CheckLine]:
    """A line for each peer, and more where something is odd. Blocks, for some seconds at most."""
    if not peers:
        return []
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="qmpd-peer") as threads:
        return [line for lines in threads.map(lambda peer: _asked(pki, peer, now), peers) for line in lines]


def _asked(pki: Pki, peer: Peer, now: datetime) -> list[CheckLine]:
    try:
        context = client_context(pki)
    except HostError as error:
        return [_PEERS.failed(peer.name, "was not asked", error.message, "mend what is above")]
    connection = http.client.HTTPSConnection(peer.host, int(peer.address.rpartition(":")[2]), timeout=STEP_S, context=context)
    try:
        connection.connect()
        shown = connection.sock.getpeercert(binary_form=True) if isinstance(connection.sock, ssl.SSLSocket) else None
        facts = describe_der(shown or b"")
        if (facts.organization, facts.role, facts.name) != (ORGANIZATION, "peer", peer.owner):
            found = f"{peer.url} is {facts.role}:{facts.name}, not peer:{peer.owner}"
            return [_PEERS.failed(peer.name, found, "It is told nothing.", "correct url or certificate of this peer in the settings")]
        connection.request("GET", PATH, headers={"Accept": "application/json"})
        response = connection.getresponse()
        return _judged(peer, facts, response.status, response.read(ANSWER_BYTES), now)
    except ssl.SSLCertVerificationError as error:
        return [_PEERS.failed(peer.name, f"{peer.url}: {error.verify_message}", "It is told nothing.", _mend(error))]
    except (OSError, http.client.HTTPException, Unreadable) as error:
        meaning = "It is down, behind a firewall, or refuses the certificate of this host."
        mend = f"see on {peer.host}: qmpd pki check, qmpctl doctor, and whether the port is open"
        return [_PEERS.warned(peer.name, f"{peer.url}: {str(error) or type(error).__name__}", meaning, mend)]
    finally:
        connection.close()


def _mend(error: ssl.SSLCertVerificationError) -> str:
    message = error.verify_message.lower()
    if "mismatch" in message or "match" in message:
        return "use a name of its certificate in url, or issue it one with this name: qmpd pki issue NAME --host HOST"
    if "not yet valid" in message:
        return "set the clocks of both hosts"
    if "expired" in message:
        return "qmpd pki renew where certificates are issued, and copy the files to that host"
    if "revoked" in message:
        return "remove it from the settings, or issue it a new certificate"
    return "see qmpd pki check on both hosts: they need certificates of one authority"


def _judged(peer: Peer, facts: CertificateFacts, status: int, body: bytes, now: datetime) -> list[CheckLine]:
    try:
        if status != http.client.OK:
            refused = msgspec.json.decode(body, type=ErrorBody)
            mend = f"name this host among the peers in the settings of {peer.host}, with the name in its certificate"
            return [_PEERS.failed(peer.name, f"refused: {refused.message[:200]}", "No machine goes there.", mend)]
        greeting = msgspec.json.decode(body, type=PeerGreeting)
        ahead = (datetime.fromisoformat(greeting.time) - datetime.now(UTC)).total_seconds()
    except (msgspec.DecodeError, msgspec.ValidationError, ValueError, TypeError):
        return [_PEERS.failed(peer.name, "its answer cannot be understood", "It is no qmpd, or one of another time.", "upgrade both")]
    found = f"{peer.url}, qmpd {greeting.version}, certificate until {facts.not_after:%Y-%m-%d}"
    lines = [_PEERS.passed(peer.name, found)]
    if facts.not_after - now < SOON:
        lines = [_PEERS.warned(peer.name, found, "Then nobody trusts it any more.", "qmpd pki renew where certificates are issued")]
    if abs(ahead) > CLOCKS_DIFFER_S:
        meaning = "Certificates that are new or end are judged differently on both."
        lines.append(_PEERS.warned(peer.name, f"its clock is {ahead:+.0f} s off ours", meaning, "set both clocks, and keep them so"))
    return lines
