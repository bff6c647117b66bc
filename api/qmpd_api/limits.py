"""Every limit of the HTTP side, in one place, each with its reason."""

from __future__ import annotations

import msgspec

KIB = 1024
MIB = 1024 * KIB


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one daemon takes from its callers. The defaults suit a host with hundreds of machines; tests use smaller ones."""

    #: The largest definition seen in practice is a few KiB; this leaves room for generated ones. Also after decompression.
    body_bytes: int = MIB
    #: The documents nest to six; pass-through QMP arguments nest deeper, but nothing QEMU takes comes near.
    depth: int = 32
    #: A megabyte of empty maps costs 58 MB once decoded; this many values cost about one.
    nodes: int = 20_000
    #: Larger bodies are decoded in a thread: beyond this, decoding would hold the event loop for more than about 10 ms.
    offload_bytes: int = 256 * KIB

    #: From the first byte of a request to the end of its head. A local client needs microseconds; this allows for a swapping host.
    head_s: float = 10.0
    #: From the end of the head to the end of the body, for at most `body_bytes`.
    body_s: float = 30.0
    #: A kept-alive connection without a request. Longer than the pauses of a client that polls once a minute.
    idle_s: float = 75.0
    #: How long a stream's reader may leave the socket full before it is cut with a reason.
    reader_s: float = 10.0
    #: How long any reader may leave the socket full before the connection is torn down; above `reader_s`, so that the reason comes first.
    stall_s: float = 20.0
    #: How long the other side may take to answer a WebSocket close frame.
    farewell_s: float = 3.0
    #: How long unread request bytes are thrown away so that the client can read a refusal instead of a reset.
    lingering_s: float = 2.0
    #: Pings on WebSockets, comments on event streams: below the minute after which proxies and firewalls forget a connection.
    heartbeat_s: float = 20.0
    #: What requests under way get to finish when the daemon ends, and again to be cancelled; with the farewell that is below ten seconds.
    shutdown_s: float = 2.0

    #: Each costs a descriptor and about 20 KiB; well below the 1,024 descriptors of an untuned process.
    connections: int = 768
    #: One user must not take them all.
    connections_per_peer: int = 512
    #: Requests of one address without a valid token or certificate, before it has to wait: a person mistypes, a program guesses.
    refusals: int = 20
    #: Seconds after which that many refusals are forgotten.
    refusals_forgotten_s: float = 60.0
    #: Addresses whose refusals are counted; each costs about 200 bytes. Beyond this they are not: nobody guesses 256 bits.
    refusing_addresses: int = 10_000
    #: Requests of invited strangers under way: each costs a signature, and they are served one after the other.
    joins: int = 8
    #: Requests under way that change something: beyond this they would only wait for each other.
    changes: int = 64
    #: Requests that wait for a machine (expect, wait, qmp). They cost a task each and no work.
    waits: int = 256

    #: One WebSocket message from a client: a very large paste.
    message_bytes: int = 64 * KIB
    #: One frame or chunk of console output.
    chunk_bytes: int = 64 * KIB
    #: One value in a query string: the longest label selector is 385 characters.
    query_characters: int = 1024

    #: The names a Host header may give us. A name of somebody else's is DNS rebinding or a misdirected proxy.
    hosts: frozenset[str] = frozenset({"localhost", "qmpd"})
    #: Web pages that may talk to us. None: qmpd has no page on another origin.
    origins: frozenset[str] = frozenset()
