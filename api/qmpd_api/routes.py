"""The whole vocabulary of the API: one row per route. The application, the published description and the tests are built from it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, TypeVar

from aiohttp import web

from qmpd import errors as e
from qmpd import migrationviews as mv
from qmpd import peerviews as pv
from qmpd import processviews as p
from qmpd import views as v
from qmpd.access import Right
from qmpd.auditviews import AuditPage
from qmpd.board import NamedBoard
from qmpd.errors import QmpdError
from qmpd.migration import protocol as mp
from qmpd.migration.likeness import DestinationFacts
from qmpd.migration.parcels import History, HistoryTaken, ItemStanding
from qmpd.spec import MachineChanges, MachineSpec
from qmpd_api import downloads, handlers, item_handlers, migration_handlers, streams, trust_handlers, tunnels
from qmpd_api.exchange import Call
from qmpd_api.handlers import Nothing
from qmpd_api.limits import KIB
from qmpd_api.queries import (
    AuditQuery,
    BoardsQuery,
    ConsoleQuery,
    CreateQuery,
    EventsQuery,
    ItemQuery,
    JobsQuery,
    LogQuery,
    MachinesQuery,
    Query,
    TunnelQuery,
    WaitQuery,
)
from qmpd_api.statuses import UpgradeRequired

B = TypeVar("B")
Q = TypeVar("Q", bound=Query)

Method = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
#: Which of the limits on requests under way counts this route. `kill` has none: it must work when nothing else does.
Pool = Literal["none", "changes", "waits", "joins"]

PNG: Final = "image/png"
PROMETHEUS: Final = "text/plain; version=0.0.4; charset=utf-8"
BYTES: Final = "application/octet-stream"
#: A token, and a request with the shortest keys there are; both are limited for themselves, too.
JOIN_BYTES: Final = 16 * KIB
GZIP: Final = "application/gzip"


@dataclass(frozen=True, kw_only=True, slots=True)
class Route(Generic[B, Q]):
    """One route. `handler` answers with a document, or with bytes of the type `produces`. With `takes` the body is bytes of that type.

    `stream` comes before it and may write a response of its own; it returns None to leave the request to `handler`. `right` is what
    the caller's role must have; `scoped` routes are also for those whose token is good for some machines only, as are all routes of
    one machine. `body_bytes` is what its body may have, where that is less than elsewhere. An answer that is not `kept` holds a secret,
    or is for somebody whom nobody knows: no Idempotency-Key makes the daemon store it. Of what is not `noted`
    the audit log has only what was not served: a disk comes in thousands of pieces.
    """

    method: Method
    path: str
    summary: str
    right: Right
    scoped: bool = False
    handler: Callable[[Call[B, Q]], Awaitable[object]] | None = None
    stream: Callable[[web.Request, Call[B, Q]], Awaitable[web.StreamResponse | None]] | None = None
    body: type[B] | None = None
    body_needed: bool = True
    takes: str | None = None
    query: type[Q]
    answer: object = None
    produces: str | None = None
    status: int = 200
    errors: tuple[type[QmpdError], ...] = ()
    pool: Pool = "none"
    revision: Literal["none", "answered", "optional", "needed"] = "none"
    body_bytes: int | None = None
    kept: bool = True
    noted: bool = True

    @property
    def name(self) -> str:
        """The operation's name in the published description."""
        function = self.handler or self.stream
        return getattr(function, "__name__", "")


_MACHINE: Final = (e.NotFound,)
_ALIVE: Final = (e.NotFound, e.WrongState, e.Held, e.QemuRefused, e.QemuDied, e.MonitorUnavailable, e.QemuSilent)
_START: Final = (e.Invalid, e.LaunchFailed, e.HostError, e.NoSpace, e.QemuSilent)
_AT: Final = "/v1/machines/{name}"
_ITEM: Final = "/v1/peer/migrations/{id}/items/{item}"

ROUTES: Final[tuple[Route[Any, Any], ...]] = (
    Route(method="GET", path="/v1/version", summary="The daemon and what it speaks", right="read", scoped=True, query=Query,
          handler=handlers.version, answer=v.Version),
    Route(method="GET", path="/v1/boards", summary="The catalogue of boards", right="read", scoped=True, query=BoardsQuery,
          handler=handlers.boards, answer=tuple[v.BoardView, ...]),
    Route(method="GET", path="/v1/boards/{id}", summary="One board file", right="read", scoped=True, query=Query,
          handler=handlers.board, answer=NamedBoard, errors=(e.NotFound,)),
    Route(method="GET", path="/v1/emulators", summary="The emulators of this host", right="read", scoped=True, query=Query,
          handler=handlers.emulators, answer=tuple[v.EmulatorView, ...], pool="waits"),
    Route(method="GET", path="/v1/check", summary="What this host can and cannot do", right="read", query=Query,
          handler=handlers.check, answer=v.CheckReport, pool="waits"),
    Route(method="GET", path="/v1/doctor", summary="What is wrong with the daemon and its machines, and what to do", right="read",
          query=Query, handler=handlers.doctor, answer=v.DoctorReport, pool="waits"),
    Route(method="GET", path="/v1/bundle", summary="A support bundle: what is known of the daemon, without secrets", right="admin",
          query=Query, stream=downloads.bundle, produces=GZIP, pool="waits"),
    Route(method="POST", path="/v1/validate", summary="All that is wrong with a definition", right="read", scoped=True, query=Query,
          handler=handlers.validate, body=MachineSpec, answer=v.ValidationReport, errors=(e.HostError,), pool="waits"),
    Route(method="POST", path="/v1/command", summary="The QEMU command of a definition", right="read", scoped=True, query=Query,
          handler=handlers.command, body=MachineSpec, answer=v.CommandView, errors=(e.Invalid, e.HostError), pool="waits"),
    Route(method="GET", path="/v1/processes", summary="The QEMUs of this host: ours, strays and foreign ones", right="read", query=Query,
          handler=handlers.processes, answer=tuple[p.ProcessView, ...], pool="waits"),
    Route(method="POST", path="/v1/adopt", summary="Take over a QEMU that somebody else started", right="admin", query=Query,
          handler=handlers.adopt, body=p.AdoptRequest, answer=v.MachineView, status=201,
          errors=(e.AlreadyExists, e.NotAdoptable, e.Held, e.NotFound, e.Forbidden, e.Invalid, e.QemuRefused, e.QemuDied,
                  e.MonitorUnavailable, e.QemuSilent), pool="changes", revision="answered"),
    Route(method="GET", path="/v1/machines", summary="The machines, ordered by name", right="read", scoped=True, query=MachinesQuery,
          handler=handlers.machines, answer=v.MachineList),
    Route(method="POST", path="/v1/machines", summary="Create a machine", right="define", scoped=True, query=CreateQuery,
          handler=handlers.create, body=MachineSpec, answer=v.MachineView, status=201,
          errors=(e.AlreadyExists, e.GoingDown, *_START), pool="changes", revision="answered"),
    Route(method="GET", path=_AT, summary="One machine", right="read", query=Query,
          handler=handlers.machine, answer=v.MachineView, errors=_MACHINE, revision="answered"),
    Route(method="PUT", path=_AT, summary="Replace the definition of a machine at rest", right="define", query=Query,
          handler=handlers.replace, body=MachineSpec, answer=v.MachineView,
          errors=(e.NotFound, e.WrongState, e.Held, e.StaleRevision, e.RevisionRequired, e.Invalid, e.NoSpace), pool="changes",
          revision="needed"),
    Route(method="PATCH", path=_AT, summary="Change of a definition what may change while the machine runs", right="define", query=Query,
          handler=handlers.update, body=MachineChanges, answer=v.MachineView,
          errors=(e.NotFound, e.StaleRevision, e.RevisionRequired, e.NoSpace), pool="changes", revision="needed"),
    Route(method="DELETE", path=_AT, summary="Delete a machine at rest, with the disks made for it", right="define", query=Query,
          handler=handlers.delete, status=204,
          errors=(e.NotFound, e.WrongState, e.Held, e.Protected, e.StaleRevision, e.RevisionRequired, e.NoSpace), pool="changes",
          revision="optional"),
    Route(method="GET", path=f"{_AT}/definition", summary="The stored definition", right="read", query=Query,
          handler=handlers.definition, answer=v.DefinitionView, errors=_MACHINE, revision="answered"),
    Route(method="GET", path=f"{_AT}/command", summary="The QEMU command of a stored definition", right="read", query=Query,
          handler=handlers.machine_command, answer=v.CommandView, errors=(e.NotFound, e.Invalid, e.HostError), pool="waits"),
    Route(method="POST", path=f"{_AT}/start", summary="Launch QEMU", right="operate", query=Query,
          handler=handlers.start, body=v.StartRequest, body_needed=False, answer=v.MachineView,
          errors=(e.NotFound, e.WrongState, e.Held, e.GoingDown, *_START), pool="changes"),
    Route(method="POST", path=f"{_AT}/stop", summary="End QEMU without asking the guest", right="operate", query=Query,
          handler=handlers.stop, body=Nothing, body_needed=False, answer=v.StopView,
          errors=(e.NotFound, e.Held, e.QemuSilent), pool="changes"),
    Route(method="POST", path=f"{_AT}/kill", summary="SIGKILL: what the guest had not flushed is lost", right="operate", query=Query,
          handler=handlers.kill, body=Nothing, body_needed=False, answer=v.StopView,
          errors=(e.NotFound, e.GivenAway, e.Held, e.QemuSilent)),
    Route(method="POST", path=f"{_AT}/power-off", summary="SIGTERM: flushes the disks, and needs no monitor", right="operate", query=Query,
          handler=handlers.power_off, body=Nothing, body_needed=False, answer=v.StopView,
          errors=(e.NotFound, e.Held, e.NotProven, e.MonitorUnavailable, e.QemuSilent), pool="changes"),
    Route(method="POST", path=f"{_AT}/reattach", summary="Try now to reach a QEMU that is unreachable or unresponsive", right="operate",
          query=Query, handler=handlers.reattach, body=Nothing, body_needed=False, answer=v.MachineView,
          errors=(*_ALIVE, e.NotProven), pool="changes"),
    Route(method="POST", path=f"{_AT}/forget", summary="Give up a machine whose QEMU cannot be reached; its files are kept", right="define",
          query=Query, handler=handlers.forget, body=p.ForgetRequest, status=204,
          errors=(e.NotFound, e.WrongState, e.Held, e.Invalid, e.StaleRevision, e.HostError, e.NoSpace), pool="changes"),
    Route(method="POST", path=f"{_AT}/reset", summary="The reset button", right="operate", query=Query,
          handler=handlers.reset, body=Nothing, body_needed=False, answer=v.MachineView, errors=_ALIVE, pool="changes"),
    Route(method="POST", path=f"{_AT}/pause", summary="Halt the vCPUs", right="operate", query=Query,
          handler=handlers.pause, body=Nothing, body_needed=False, answer=v.MachineView, errors=_ALIVE, pool="changes"),
    Route(method="POST", path=f"{_AT}/resume", summary="Let the vCPUs go on", right="operate", query=Query,
          handler=handlers.resume, body=Nothing, body_needed=False, answer=v.MachineView, errors=_ALIVE, pool="changes"),
    Route(method="POST", path=f"{_AT}/shutdown", summary="Ask the guest to shut down, as a job", right="operate", query=Query,
          handler=handlers.shutdown, body=v.ShutdownRequest, body_needed=False, answer=v.JobView, status=202, errors=_ALIVE,
          pool="changes"),
    Route(method="GET", path=f"{_AT}/wait", summary="Wait until the machine is in a state", right="read", query=WaitQuery,
          handler=handlers.wait, answer=v.MachineView, errors=(e.NotFound, e.NotYet), pool="waits"),
    Route(method="POST", path=f"{_AT}/qmp", summary="Pass one QMP command through", right="admin", query=Query,
          handler=handlers.qmp, body=v.QmpRequest, answer=v.QmpAnswer, errors=(e.Forbidden, *_ALIVE), pool="waits"),
    Route(method="GET", path=f"{_AT}/qmp", summary="QMP commands one after the other, as a WebSocket", right="admin", query=Query,
          stream=streams.qmp_session, status=101, errors=(e.NotFound, UpgradeRequired)),
    Route(method="GET", path=f"{_AT}/screenshot", summary="The display as a PNG image", right="read", query=Query,
          handler=handlers.screenshot, produces=PNG, errors=_ALIVE, pool="waits"),
    Route(method="POST", path=f"{_AT}/send-key", summary="Press keys together", right="operate", query=Query,
          handler=handlers.send_key, body=v.SendKeyRequest, status=204, errors=_ALIVE, pool="changes"),
    Route(method="GET", path=f"{_AT}/console", summary="The serial console, as a WebSocket", right="operate", query=ConsoleQuery,
          stream=streams.console, status=101, errors=(e.NotFound, UpgradeRequired)),
    Route(method="GET", path=f"{_AT}/log", summary="The serial console's log", right="read", query=LogQuery,
          stream=downloads.log, produces=BYTES, errors=_MACHINE),
    Route(method="POST", path=f"{_AT}/expect", summary="Type, and wait for output that matches", right="operate", query=Query,
          handler=handlers.expect, body=v.ExpectRequest, answer=v.ExpectResult, errors=(e.NotFound, e.MonitorUnavailable), pool="waits"),
    Route(method="GET", path="/v1/events", summary="Events: a page, an event stream, or a WebSocket", right="read", query=EventsQuery,
          handler=handlers.events, stream=streams.events, answer=v.EventPage, errors=(e.EventsGone,)),
    Route(method="POST", path="/v1/shutdown", summary="End all machines, because the host goes down, as a job", right="admin", query=Query,
          handler=handlers.shutdown_host, body=v.HostShutdownRequest, body_needed=False, answer=v.JobView, status=202,
          errors=(e.GoingDown,), pool="changes"),
    Route(method="GET", path="/v1/jobs", summary="The jobs, newest first", right="read", scoped=True, query=JobsQuery,
          handler=handlers.jobs, answer=v.JobList),
    Route(method="GET", path="/v1/jobs/{id}", summary="One job", right="read", scoped=True, query=Query,
          handler=handlers.job, answer=v.JobView, errors=(e.NotFound,)),
    Route(method="POST", path="/v1/jobs/{id}/cancel", summary="Ask a job to stop", right="operate", scoped=True, query=Query,
          handler=handlers.cancel, body=Nothing, body_needed=False, answer=v.JobView, errors=(e.NotFound, e.WrongState), pool="changes"),
    Route(method="GET", path="/v1/tokens", summary="The tokens, without their secrets", right="admin", query=Query,
          handler=trust_handlers.tokens, answer=tuple[v.TokenView, ...]),
    Route(method="POST", path="/v1/tokens", summary="Make a token; its text is in the answer and nowhere else", right="admin", query=Query,
          handler=trust_handlers.create_token, body=v.TokenRequest, answer=v.NewToken, status=201, errors=(e.Invalid, e.NoSpace),
          pool="changes", kept=False),
    Route(method="DELETE", path="/v1/tokens/{id}", summary="End a token at once", right="admin", query=Query,
          handler=trust_handlers.revoke_token, status=204, errors=(e.NotFound, e.NoSpace), pool="changes"),
    Route(method="GET", path="/v1/peers", summary="The other daemons that machines are moved to and from", right="read", query=Query,
          handler=trust_handlers.peers, answer=tuple[pv.PeerView, ...]),
    Route(method="GET", path="/v1/peers/{id}/health", summary="Ask a peer now whether it can be reached, and what it says", right="read",
          query=Query, handler=trust_handlers.peer_health, answer=pv.PeerHealth, errors=(e.NotFound,), pool="waits"),
    Route(method="GET", path="/v1/peer", summary="What this daemon says to a peer that asks", right="peer", query=Query,
          handler=trust_handlers.greeting, answer=pv.PeerGreeting),
    Route(method="POST", path=f"{_AT}/migrate", summary="Move a machine to a peer, or copy it, as a job", right="admin", query=Query,
          handler=migration_handlers.migrate, body=mv.MigrateRequest, answer=v.JobView, status=202,
          errors=(e.NotFound, e.Forbidden, e.WrongState, e.GivenAway, e.GoingDown), pool="changes"),
    Route(method="POST", path=f"{_AT}/disks/{{id}}/move", summary="Move a disk of a running machine to another file, as a job",
          right="admin", query=Query, handler=migration_handlers.move_disk, body=mv.MoveDiskRequest, answer=v.JobView, status=202,
          errors=(e.AlreadyExists, e.CannotMove, e.Invalid, e.NoSpace, *_ALIVE), pool="changes"),
    Route(method="POST", path=f"{_AT}/upgrade-emulator", summary="Have another QEMU take the place of a machine's, as a job", right="admin",
          query=Query, handler=migration_handlers.upgrade_emulator, body=mv.UpgradeRequest, body_needed=False, answer=v.JobView,
          status=202, errors=(e.NotFound, e.WrongState, e.CannotMove, e.GivenAway), pool="changes"),
    Route(method="PATCH", path=f"{_AT}/migration", summary="Another goal for a migration that is under way", right="admin", query=Query,
          handler=migration_handlers.tune_migration, body=mv.GoalChanges, answer=mv.MigrationView,
          errors=(e.NotFound, e.WrongState, e.Invalid, *_ALIVE), pool="changes"),
    Route(method="GET", path="/v1/migrations", summary="The migrations to and from this host, newest first", right="read",
          query=JobsQuery, handler=migration_handlers.migrations, answer=mv.MigrationList),
    Route(method="POST", path=f"{_AT}/migration/resolve", summary="Decide about a machine of which no host can find out who owns it",
          right="admin", query=Query, handler=migration_handlers.resolve_migration, body=mv.ResolveRequest, answer=mv.MigrationView,
          errors=(e.NotFound, e.WrongState, e.Invalid), pool="changes"),
    Route(method="POST", path="/v1/peer/migrations", summary="Get ready for a machine of a peer", right="peer", query=Query,
          handler=migration_handlers.offer, body=mp.Offer, answer=mp.Acceptance, status=201,
          errors=(e.Busy, e.CannotMove, e.AlreadyExists, e.GoingDown, e.Held, e.Forbidden, e.MigrationFailed, e.NotFound, *_START),
          pool="changes"),
    Route(method="POST", path="/v1/peer/trials", summary="Whether a machine of a peer could be here; nothing is left of it", right="peer",
          query=Query, handler=migration_handlers.tried, body=mp.Offer, answer=DestinationFacts,
          errors=(e.Busy, e.CannotMove, e.Forbidden, e.HostError, e.NoSpace), pool="waits", kept=False),
    Route(method="PUT", path="/v1/peer/freight", summary="Bytes that are thrown away, to measure the way", right="peer", query=Query,
          handler=migration_handlers.carried, takes=BYTES, answer=mp.Landed, errors=(e.Forbidden,), pool="waits", noted=False),
    Route(method="GET", path="/v1/peer/migrations/{id}", summary="How far this host is with a migration", right="peer", query=Query,
          handler=migration_handlers.standing, answer=mp.Standing, errors=(e.NotFound,)),
    Route(method="POST", path="/v1/peer/migrations/{id}/loaded", summary="Wait until a machine's whole state is here", right="peer",
          query=Query, handler=migration_handlers.loaded, body=mp.LoadedRequest, answer=mp.Standing,
          errors=(e.NotFound, e.HostError, e.NoSpace), pool="waits"),
    Route(method="POST", path="/v1/peer/migrations/{id}/take", summary="Take over a machine that the peer has given away", right="peer",
          query=Query, handler=migration_handlers.take, body=mp.Handover, answer=mp.Standing,
          errors=(e.NotFound, e.WrongState, e.Forbidden, e.QemuSilent, e.NoSpace), pool="changes"),
    Route(method="POST", path="/v1/peer/migrations/{id}/recover", summary="Listen again for memory that follows a guest here", right="peer",
          query=Query, handler=migration_handlers.recover, body=mp.RecoverRequest, answer=mp.Endpoint,
          errors=(e.NotFound, e.MigrationFailed, *_ALIVE), pool="changes"),
    Route(method="POST", path="/v1/peer/migrations/{id}/discard", summary="Discard a machine that the peer keeps", right="peer",
          query=Query, handler=migration_handlers.discard, body=mp.DiscardRequest, answer=mp.Standing,
          errors=(e.NotFound, e.NoSpace), pool="changes"),
    Route(method="POST", path="/v1/peer/migrations/{id}/history", summary="Tell what happened to a machine before it came here",
          right="peer", query=Query, handler=item_handlers.tell_history, body=History, answer=HistoryTaken,
          errors=(e.NotFound, e.WrongState, e.NoSpace), pool="changes"),
    Route(method="GET", path="/v1/peer/migrations/{id}/tunnel", summary="A connection of QEMU's to the one that waits here (WebSocket)",
          right="peer", query=TunnelQuery, stream=tunnels.tunnel, status=101,
          errors=(e.NotFound, e.WrongState, e.Busy, e.MigrationFailed, UpgradeRequired)),
    Route(method="POST", path="/v1/pki/join", summary="Get a certificate, once, with the token of an invitation", right="join", query=Query,
          handler=trust_handlers.join, body=pv.JoinRequest, answer=pv.JoinAnswer, errors=(e.NotFound, e.Invalid, e.HostError),
          pool="joins", body_bytes=JOIN_BYTES, kept=False),
    Route(method="GET", path="/v1/pki/crl", summary="What the authority of this daemon revoked", right="known", scoped=True, query=Query,
          handler=trust_handlers.revoked, answer=pv.RevocationView, errors=(e.NotFound, e.HostError)),
    Route(method="GET", path="/v1/audit", summary="Who changed what, and who was refused, newest first", right="admin", query=AuditQuery,
          handler=trust_handlers.audit, answer=AuditPage, pool="waits"),
    Route(method="GET", path=_ITEM, summary="How much of an item of a machine that comes is here", right="peer", query=Query,
          handler=item_handlers.item, answer=ItemStanding, errors=(e.NotFound, e.WrongState, e.HostError), pool="waits"),
    Route(method="PUT", path=_ITEM, summary="Hand in a piece of a file or log of a machine that comes", right="peer",
          query=ItemQuery, handler=item_handlers.put_item, takes=BYTES, answer=ItemStanding,
          errors=(e.NotFound, e.WrongState, e.HostError, e.NoSpace), pool="waits", noted=False),
    Route(method="GET", path="/metrics", summary="The numbers of this daemon for Prometheus", right="read", query=Query,
          handler=handlers.metrics, produces=PROMETHEUS),
    Route(method="GET", path="/v1/openapi.json", summary="This description", right="read", scoped=True, query=Query,
          stream=downloads.description, answer=dict[str, object]),
)  # fmt: skip
