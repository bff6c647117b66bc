"""What follows when a machine was given away: its new owner is told, until it is known that it has the machine, or will never run it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from typing import Final, TypeVar

import msgspec

from qmpd import power
from qmpd.errors import CannotMove, MigrationFailed, NotYet, PeerError, PeerRefused, QmpdError
from qmpd.failpoint import passing
from qmpd.journal import Journal
from qmpd.machine import Machine, Publish
from qmpd.migration.addresses import TcpAddress
from qmpd.migration.belongings import REST_LIMIT_S, Belongings, bare_ends
from qmpd.migration.discrepancy import found
from qmpd.migration.fileitems import DIGEST_LIMIT_S
from qmpd.migration.following import follow
from qmpd.migration.items import Target
from qmpd.migration.ledger import Ledger
from qmpd.migration.persistence import persist
from qmpd.migration.phases import Phase, Step
from qmpd.migration.protocol import ConsoleEnd, Handover, Standing
from qmpd.migration.shipping import Shipment, Shipping
from qmpd.migrationviews import MigrationFinding
from qmpd.peers import PeerDaemon
from qmpd.registry import Registry
from qmpd.settings import Peer
from qmpd.tasks import undivided

#: A peer that does not answer is asked again after this, and then less and less often.
AGAIN_S: Final = 0.5
LONGEST_AGAIN_S: Final = 10.0
#: What is not certain, or cannot be done yet, is tried again this often: nothing else may be done with the machine before.
DOUBT_S: Final = 1.0

#: An offer whose answer was lost is repeated this long; the peer starts a QEMU meanwhile.
OFFER_DEADLINE_S: Final = 60.0
#: What a peer answers whose outcome may be another one later: it is busy with the same, or short of something.
_LATER: Final = frozenset({"too_many_requests", "qemu_silent", "monitor_unavailable", "no_space", "outcome_unknown"})

#: What a destination answers about a guest that will not wait for its memory any more: it has ended.
_NOBODY: Final = frozenset({"wrong_state"})
T = TypeVar("T")

_log = logging.getLogger(__name__)


class Departure:
    """One machine on its way, held by its migration. `problem` says why it cannot go on at the moment."""

    def __init__(self, migration: str, machine: Machine, verb: str = "migrate") -> None:
        self.migration = migration
        self.machine = machine
        self.verb = verb
        self.problem = ""
        #: The commit that gives it away was begun: only that commit's outcome says who owns the machine.
        self.giving = False
        self.decided = asyncio.Event()
        #: The destination said that it has taken the machine: it runs there, whatever anybody decides here.
        self.taken = False
        #: Held while the destination is asked to take it and its answer is heeded, and while it is taken back.
        self.lock = asyncio.Lock()
        #: What is under way, while it is; and the goal that it is kept to.
        self.shipment: Shipment | None = None
        self.belongings: Belongings | None = None
        self.job: str | None = None
        #: What is sent in the place of files that a guest writes to, by item.
        self.elsewhere: dict[str, Target] = {}
        #: What was found before it, and did not prevent it.
        self.findings: tuple[MigrationFinding, ...] = ()
        self._held = ExitStack()

    def hold(self) -> None:
        """Keeps other verbs out. Raises Held."""
        self._held.enter_context(self.machine.holding(self.verb))

    def release(self) -> None:
        """Lets others at it."""
        self._held.close()

    def say(self, problem: str) -> None:
        """Notes why it cannot go on."""
        self.problem = problem


class Deliveries:
    """Carries out what was decided with the commit that gives a machine away. `departures` are those of `Departures`, by migration."""

    def __init__(
        self,
        *,
        registry: Registry,
        ledger: Ledger,
        journal: Journal,
        shipping: Shipping,
        publish: Publish,
        departures: dict[str, Departure],
    ) -> None:
        self._registry = registry
        self._journal = journal
        self._ledger = ledger
        self._shipping = shipping
        self._publish = publish
        self._departures = departures
        #: The daemon ends: what cannot be done now is left to the next one.
        self.closing = False

    def handover(self, departure: Departure) -> Handover:
        """What the new owner is told."""
        entry = self._ledger.get(departure.migration)
        return Handover(epoch=entry.epoch, run=entry.went, consoles=ends_of(departure))

    async def _follow(self, departure: Departure, link: PeerDaemon, peer: Peer) -> None:
        """In postcopy: stays until the guest has all of its memory at the destination."""
        entry = self._ledger.get(departure.migration)

        async def rejoin() -> tuple[TcpAddress, str] | None:
            try:
                endpoint = await asked(lambda: link.recover(entry.id))
            except PeerRefused as error:
                if code_of(error) in _NOBODY:
                    return None
                raise
            return TcpAddress(host=peer.migration_address or peer.host, port=endpoint.port), endpoint.secret

        await follow(departure.machine, rejoin)

    async def deliver(self, departure: Departure, link: PeerDaemon, peer: Peer) -> None:
        """Tells the destination that it is the owner, for as long as that takes.

        Raises:
            MigrationFailed: the destination had discarded it before, and it is here again.
        """
        entry, handover = self._ledger.get(departure.migration), self.handover(departure)
        pause = AGAIN_S
        while True:
            async with departure.lock:
                if departure.decided.is_set():
                    raise MigrationFailed(f"an operator decided about the machine, which is {self._ledger.get(entry.id).phase}")
                found = await self._taken(departure, link, handover)
            if found is not None:
                break
            pause = await _waited(departure.decided, pause)
        if entry.offer.postcopy:
            await self._follow(departure, link, peer)
        reason = found.reason or found.problem
        await self.persist(departure, lambda: self._ledger.step(entry.id, Step.CONFIRM, reason=reason), "to note that it has arrived")
        await self.follow(departure, link, found)
        await undivided(self.clear(departure), f"clear:{entry.machine}")

    async def _taken(self, departure: Departure, link: PeerDaemon, handover: Handover) -> Standing | None:
        """What the destination says when it has taken the machine; None while it does not say so. Raises MigrationFailed as `deliver`."""
        try:
            found = await asked(lambda: link.take(departure.migration, handover))
        except PeerError as error:
            self._doubted(departure, error)
            return None
        if found.phase is Phase.DISCARDED:
            await undivided(self.take_back(departure, found.reason), f"take-back:{departure.machine.name}")
            raise MigrationFailed(f"the destination lost the machine before it ran there, and it goes on here: {found.reason}")
        if found.phase in {Phase.TAKEN, Phase.ARRIVED}:
            departure.taken = True
            departure.problem = ""
            return found
        self._doubted(departure, MigrationFailed(f"the destination says that it is {found.phase}"))
        return None

    async def persist(self, departure: Departure, work: Callable[[], Awaitable[T]], what: str) -> T:
        """See `persistence.persist`."""
        return await persist(work, what=what, say=departure.say, ending=lambda: self.closing)

    def _doubted(self, departure: Departure, error: QmpdError) -> None:
        entry = self._ledger.get(departure.migration)
        problem = f"whether {entry.peer} has taken the machine is not known: {error.message}"
        if problem != departure.problem:
            departure.problem = problem
            _log.error("ownership in doubt", extra={"machine": entry.machine, "peer": entry.peer, "error": error.message})
            self._publish("migration.doubt", entry.machine, {"migration": entry.id, "peer": entry.peer, "reason": problem})

    async def take_back(self, departure: Departure, reason: str) -> None:
        """Takes a machine back that its destination will never run."""
        machine, entry = departure.machine, self._ledger.get(departure.migration)
        own = msgspec.structs.replace(machine.definition, given=None, epoch=entry.epoch + 1)

        async def returned() -> None:
            await passing("ownership-return")
            if machine.definition.given is not None:
                await self._registry.store(machine, own, machine.revision)
            if self._ledger.get(entry.id).phase is Phase.GIVEN:
                await self._ledger.step(entry.id, Step.RETURNED, reason=reason)

        await self.persist(departure, returned, "to take it back")
        await self.persist(departure, lambda: self._shipping.recall(machine, entry, lost=True), "to make it as it was")
        await self.persist(departure, lambda: self._ledger.settle(entry.id), "to note that all is done")
        self._departures.pop(entry.id, None)
        departure.release()
        self._publish("migration.returned", machine.name, {"migration": entry.id, "peer": entry.peer, "reason": reason})

    async def clear(self, departure: Departure) -> None:
        """Removes what is left here of a machine that another host owns and has."""
        machine, entry = departure.machine, self._ledger.get(departure.migration)
        while True:
            try:
                await power.kill(machine)
                await self._registry.depart(machine)
                break
            except (QmpdError, OSError) as error:
                departure.problem = f"it has arrived, and what is left of it here cannot be removed yet: {error}"
                _log.error("rest of a machine that moved is not removed", extra={"machine": machine.name, "error": str(error)})
                if self._registry.known(machine.name) is not machine:
                    break  # only files are left, of which the log tells
                if self.closing:
                    return
            await asyncio.sleep(DOUBT_S)
        await self.persist(departure, lambda: self._ledger.settle(entry.id), "to note that all is done")
        self._departures.pop(entry.id, None)
        departure.release()
        self._publish("migration.moved", machine.name, {"migration": entry.id, "peer": entry.peer})

    async def follow(self, departure: Departure, link: PeerDaemon, found: Standing | None = None) -> None:
        """Sends what the new owner has not got of the logs, and tells what happened here. Nothing of that is worth waiting for ever.

        `found` is how far that host was, if it has just said so. Who is cancelled leaves it to the next daemon.
        """
        machine = departure.machine
        paths = self._registry.paths(machine.name)
        belongings = departure.belongings or Belongings(machine, paths, departure.migration, link, self._journal)
        try:
            async with asyncio.timeout(REST_LIMIT_S):
                while True:
                    try:
                        if found is None:
                            found = await asked(partial(link.standing, departure.migration))
                        await belongings.finish(found.logs)
                        break
                    except PeerRefused:
                        raise
                    except PeerError:
                        found = None
                    await asyncio.sleep(AGAIN_S)
        except (QmpdError, TimeoutError, OSError) as error:
            _log.warning("the end of a log was not sent", extra={"machine": departure.machine.name, "error": str(error)})


def ends_of(departure: Departure) -> tuple[ConsoleEnd, ...]:
    """Where the logs of a machine ended whose guest stands still here for good."""
    return departure.belongings.ends if departure.belongings is not None else bare_ends(departure.machine)


async def asked(question: Callable[[], Awaitable[T]]) -> T:
    """The answer of a peer to a question. Raises PeerError."""
    await passing("peer-ask")
    answer = await question()
    await passing("peer-answered")
    return answer


async def insisted(question: Callable[[], Awaitable[T]]) -> T:
    """The answer of a peer that is to get ready for a machine, or to try one. An answer that was lost is asked for again,
    and one that takes long (`not_yet`) for as long as it does.

    Raises:
        CannotMove: it refuses.
        PeerError: it does not answer.
    """
    loop = asyncio.get_running_loop()
    until, at_last = loop.time() + OFFER_DEADLINE_S, loop.time() + DIGEST_LIMIT_S
    while True:
        try:
            return await asked(question)
        except PeerRefused as error:
            if code_of(error) == NotYet.code and loop.time() < at_last:
                until = loop.time() + OFFER_DEADLINE_S
            elif code_of(error) not in _LATER or loop.time() > until:
                raise _refusal(error) from error
        except PeerError:
            if loop.time() > until:
                raise
        await asyncio.sleep(AGAIN_S)


def _refusal(error: PeerRefused) -> CannotMove:
    said = error.details.get("error")
    details = said.get("details") if isinstance(said, dict) else None
    problems = details.get("problems") if isinstance(details, dict) else None
    findings = [
        msgspec.to_builtins(found("error", "cannot-start", str(problem.get("message")), path=str(problem.get("path", ""))))
        for problem in (problems if isinstance(problems, list) else [])
        if isinstance(problem, dict)
    ]
    return CannotMove(error.message, peer=error.details.get("peer"), error=said, **({"findings": findings} if findings else {}))


async def _waited(decided: asyncio.Event, pause: float) -> float:
    try:
        async with asyncio.timeout(pause):
            await decided.wait()
    except TimeoutError:
        pass
    return min(2 * pause, LONGEST_AGAIN_S)


def code_of(error: PeerError) -> str:
    """The code of the error that the peer answered with."""
    said = error.details.get("error")
    return str(said.get("code")) if isinstance(said, dict) else error.code
