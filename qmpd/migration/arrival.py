"""How it ends with a machine that may come here: this host takes it, or discards it. Each once and for all, and written down first."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, TypeVar

import msgspec

from qmpd import power, tpm
from qmpd.errors import Busy, Forbidden, MonitorUnavailable, NoSpace, QemuSilent, QmpdError, StaleRevision, WrongState
from qmpd.failpoint import passing
from qmpd.lifecycle import AT_REST, Happening, State
from qmpd.machine import Machine, Publish
from qmpd.migration.admission import Admissions
from qmpd.migration.ledger import Entry, Ledger
from qmpd.migration.patience import unlocked
from qmpd.migration.persistence import persist
from qmpd.migration.phases import OWNED, UNOWNED, Phase, Step
from qmpd.migration.protocol import Acceptance, Channel, ConsoleEnd, Handover, LogReceived, console_end
from qmpd.migration.reception import Awaited, Reception, remove_made
from qmpd.migration.tunnel import Meter
from qmpd.record import mark_begun, write_record
from qmpd.registry import Registry
from qmpd.storage import mark_finished, mark_unfinished
from qmpd.tasks import Tasks

#: A QEMU that has the whole state and does not answer may be busy for a moment; after this the source is told to ask again.
ANSWER_S: Final = 10.0
#: A process whose monitor is gone follows at once, if it has ended.
GONE_S: Final = 1.0
#: What could not be done is tried again this often.
AGAIN_S: Final = 1.0

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Arrival:
    """One machine that may come here, held by its migration. `problem` says what keeps it from going on; `changed` is set and replaced
    whenever it got further."""

    def __init__(self, migration: str, peer: str, machine: Machine) -> None:
        self.migration = migration
        self.peer = peer
        self.machine = machine
        self.acceptance: Acceptance | None = None
        self.awaited: Awaited | None = None
        self.problem = ""
        #: The commit by which this host becomes the owner was begun: only its outcome says who owns the machine.
        self.owning = False
        #: It is this host's own, and waits for the lock of an image.
        self.locked_out = False
        self.meter = Meter()
        self._led_in: Counter[Channel] = Counter()
        self.lock = asyncio.Lock()
        self.changed = asyncio.Event()
        self._held = ExitStack()
        self._held.enter_context(machine.holding("migrate"))

    def release(self) -> None:
        """Lets others at the machine, and awaits nobody for it any more."""
        if self.awaited is not None:
            self.awaited.close()
        self._held.close()

    @contextmanager
    def led_in(self, channel: Channel, most: int) -> Iterator[None]:
        """Counts a connection through the tunnel. Raises Busy where there are as many as QEMU could want."""
        if self._led_in[channel] >= most:
            raise Busy(f"{most} connections for {channel} are open already, which is all that this migration needs", limit=most)
        self._led_in[channel] += 1
        try:
            yield
        finally:
            self._led_in[channel] -= 1

    def say(self, problem: str) -> None:
        """Notes why it cannot go on."""
        self.problem = problem

    def tell(self) -> None:
        """Wakes everybody who waits for it."""
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class Endings:
    """Takes and discards. `arrivals` are those of `Arrivals`, by migration."""

    def __init__(
        self,
        *,
        registry: Registry,
        ledger: Ledger,
        reception: Reception,
        admissions: Admissions,
        tasks: Tasks,
        publish: Publish,
        arrivals: dict[str, Arrival],
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._reception = reception
        self._admissions = admissions
        self._tasks = tasks
        self._publish = publish
        self._arrivals = arrivals
        #: The daemon ends: what cannot be done now is left to the next one.
        self.closing = False

    async def take(self, arrival: Arrival, handover: Handover) -> None:
        """Makes a machine this host's own, because its owner has given it, and lets it go on. May be repeated.

        Raises:
            WrongState, Forbidden: it cannot have been given, or not like this.
            QemuSilent, NoSpace, Unknown: not done yet.
        """
        async with arrival.lock:
            entry = self._ledger.get(arrival.migration)
            if entry.phase is Phase.AWAITING:
                raise WrongState("the machine's state is not here yet", state=str(entry.phase), allowed=["loaded"])
            if entry.phase is Phase.LOADED:
                if handover.epoch != entry.epoch:
                    raise Forbidden(f"the machine was offered under epoch {entry.epoch}, not {handover.epoch}")
                if not entry.at_rest and not await self._ready_to_run(arrival):
                    return
                ends = await self._unpack(arrival, handover)
                if handover.run is not entry.went:  # a daemon that dies between the commit and the note of it must know that
                    await self._ledger.note(entry.id, went=handover.run)
                await self._own(arrival, went=handover.run, log_ends={end.port: end.end for end in ends})
            elif entry.phase in OWNED and handover.consoles and not entry.log_ends:  # such a daemon's successor hears it again
                await self._ledger.note(entry.id, log_ends={end.port: end.end for end in handover.consoles})
            if self._ledger.get(arrival.migration).phase is Phase.TAKEN and not arrival.locked_out:
                await self.set_going(arrival)

    async def _ready_to_run(self, arrival: Arrival) -> bool:
        """Whether QEMU is there and answers. One that has ended, or lost its TPM, is discarded, so that the source can go on with what it
        still has."""
        machine = arrival.machine
        await machine.until(AT_REST | {State.INCOMING}, ANSWER_S)
        # Asked, and not only remembered: who takes what died a moment ago owns a machine that is lost, though the source still has it.
        answers = machine.state is State.INCOMING and await self._reception.answers(machine)
        if not answers and await machine.until(AT_REST, GONE_S):
            await self._discard_locked(arrival, last_words(machine))
            return False
        if answers and tpm.is_lost(machine.session.process):
            await self._discard_locked(arrival, "the destination's TPM ended")
            return False
        if not answers:
            raise QemuSilent(f"the destination's QEMU is {machine.state}: ask again", state=str(machine.state))
        return True

    async def _unpack(self, arrival: Arrival, handover: Handover) -> tuple[ConsoleEnd, ...]:
        """Puts what came where it belongs; where the logs ended. One of which the source said nothing goes on where it ends here."""
        machine, entry = arrival.machine, self._ledger.get(arrival.migration)
        said = {end.port: end for end in handover.consoles}
        came = await self._reception.logs(self._admissions.delivery(entry, tuple(machine.consoles)))
        missing = [console_end(log.port, log.received, log.received) for log in came if log.port not in said]
        ends = (*handover.consoles, *missing)
        self._admissions.logs_end(entry.id, {end.port: end.end for end in ends})
        delivery = self._admissions.delivery(entry, tuple(machine.consoles))
        if entry.at_rest:
            named = await self._reception.name_files(delivery)
            await self._ledger.note(entry.id, made=named)  # if it is discarded all the same, they go as well
        else:
            await self._reception.unpack(machine, delivery, ends)
        return ends

    async def note_whole(self, arrival: Arrival) -> None:
        """Notes that all of a machine at rest is here, if it is. From then on a daemon that is started must not take its files for rubbish.

        Raises:
            HostError, NoSpace: it cannot be noted.
        """
        machine = arrival.machine
        async with arrival.lock:
            entry = self._ledger.get(arrival.migration)
            if entry.phase is not Phase.AWAITING:
                return
            if await self._reception.is_whole(self._admissions.delivery(entry, tuple(machine.consoles))):
                await asyncio.to_thread(mark_finished, self._registry.paths(machine.name).state)
                await self._ledger.step(entry.id, Step.LOAD)
                arrival.tell()

    async def logs(self, entry: Entry) -> tuple[LogReceived, ...]:
        """How much is here of the logs of a machine that this host has taken, as long as it is here."""
        machine = self._registry.known(entry.machine)
        if machine is None or entry.phase not in OWNED or machine.definition.arrived != entry.id:
            return ()
        return await self._reception.logs(self._admissions.delivery(entry, tuple(machine.consoles)))

    async def _own(self, arrival: Arrival, *, went: bool, log_ends: dict[int, int]) -> None:
        """The commit by which this host becomes the owner; then the note of it, whatever that takes."""
        machine = arrival.machine
        await passing("ownership-take")
        arrival.owning = True
        await self._registry.store(machine, machine.definition, machine.revision)
        await self._persist(
            arrival, lambda: self._ledger.step(arrival.migration, Step.TAKE, went=went, log_ends=log_ends), "to note that it was taken"
        )
        await passing("ownership-taken")

    async def _persist(self, arrival: Arrival, work: Callable[[], Awaitable[T]], what: str) -> T:
        return await persist(work, what=what, say=arrival.say, ending=lambda: self.closing)

    async def _is_owned(self, arrival: Arrival) -> bool:
        """Whether this host owns the machine after all: a commit whose outcome was not known is made again, and tells.

        Raises:
            Unknown, Busy: it is still not known. Then nothing may be done about the machine.
        """
        if not arrival.owning or self._ledger.get(arrival.migration).phase is not Phase.LOADED:
            return False
        machine = arrival.machine
        if not machine.revision:
            try:
                await self._registry.store(machine, machine.definition, 0)
            except (NoSpace, StaleRevision):
                return False
        await self._persist(arrival, lambda: self._ledger.step(arrival.migration, Step.TAKE), "to note that it was taken")
        return True

    async def set_going(self, arrival: Arrival) -> None:
        """Lets an owned machine go on, and does what has to follow. What fails here is said, and the machine is here all the same."""
        machine, entry = arrival.machine, self._ledger.get(arrival.migration)
        if machine.awaited:  # until now its end was no failure of its guest; whoever asks for it from now on is heard
            machine.awaited = machine.asked_to_end = False
            if not entry.at_rest and machine.state is State.STOPPED and machine.exit is not None and not machine.exit.clean:
                machine.happen(Happening.DIED)  # between the last look at it and the commit
                machine.on_end(machine)
        locked = ""
        while machine.state not in AT_REST:
            try:
                locked = await self._reception.go(machine, run=entry.went)
            except (Busy, MonitorUnavailable, QemuSilent) as error:  # it answers again, or ends
                arrival.problem = f"it is here, and cannot be set going yet: {error.message}"
                await machine.until(AT_REST, AGAIN_S)
            except QmpdError as error:
                arrival.problem = f"it is here, and could not be set going: {error.message}"
                _log.error("machine was taken over and does not run", extra={"machine": machine.name, "error": error.message})
                break
            else:
                arrival.problem = ""
                break
        await self._reception.secure(self._admissions.delivery(entry, tuple(machine.consoles)))
        if entry.at_rest:
            await self._registry.look_back([machine])
        await asyncio.to_thread(self._note_owned, machine)
        if locked:
            self._wait(arrival, locked)
        else:
            await self._arrived(arrival)

    def _wait(self, arrival: Arrival, locked: str) -> None:
        """Has it set going later. It is held meanwhile, and the source is not: it may be its QEMU that has the lock."""
        machine = arrival.machine
        arrival.locked_out = True
        arrival.problem = f"it is here, and waits for the lock of an image: {locked}"
        _log.warning("machine waits for the lock of an image", extra={"machine": machine.name, "error": locked})
        self._publish("machine.locked-out", machine.name, {"migration": arrival.migration, "peer": arrival.peer, "reason": locked})
        self._tasks.start(self._unlocked(arrival, locked), f"lock:{machine.name}")

    async def _unlocked(self, arrival: Arrival, locked: str) -> None:
        obstacle = await unlocked(arrival.machine, lambda: self._reception.go(arrival.machine, run=True, patience_s=0), locked)
        arrival.problem = f"it is here, and could not be set going: {obstacle}" if obstacle else ""
        async with arrival.lock:
            await self._arrived(arrival)

    async def _arrived(self, arrival: Arrival) -> None:
        """It is here for good, and runs if that is possible."""
        machine, entry, problem = arrival.machine, self._ledger.get(arrival.migration), arrival.problem
        await self._persist(arrival, lambda: self._ledger.step(entry.id, Step.RUN, reason=problem), "to note that it is here")
        self._publish("machine.arrived", machine.name, {"migration": entry.id, "peer": entry.peer, "problem": problem})
        if entry.offer.postcopy:  # the rest of its memory may take minutes, and the source waits to hear that it runs
            self._tasks.start(self.settle_in(arrival), f"settle-in:{machine.name}")
        else:
            await self.settle_in(arrival)

    async def settle_in(self, arrival: Arrival) -> None:
        """Puts an owned machine's QEMU back to what it would be without a migration. Until then the machine is held: the next migration
        of it would take what this one left for its own."""
        entry = self._ledger.get(arrival.migration)
        if arrival.machine.launch is not None and arrival.machine.launch.incoming is not None:  # there was no room for it before
            await asyncio.to_thread(self._note_owned, arrival.machine)
        if arrival.machine.state not in AT_REST:
            before = entry.before.dials if entry.before is not None else None
            await self._reception.settle_in(arrival.machine, before, postcopy=entry.offer.postcopy)
        await self.end(arrival)

    def _note_owned(self, machine: Machine) -> None:
        mark_finished(self._registry.paths(machine.name).state)
        if machine.launch is not None:
            mark_begun(machine.launch.run_dir)
            owned = msgspec.structs.replace(machine.launch, incoming=None, definition=machine.definition)
            try:
                write_record(owned.run_dir, owned)
            except OSError as error:
                _log.warning("launch record was not written anew", extra={"machine": machine.name, "error": str(error)})
                return
            machine.launch = owned

    async def discard(self, arrival: Arrival, reason: str) -> None:
        """Discards a machine that is not this host's own, with all that was made for it here. May be repeated."""
        async with arrival.lock:
            if await self._is_owned(arrival):
                await self.set_going(arrival)
            else:
                await self._discard_locked(arrival, reason)

    async def _discard_locked(self, arrival: Arrival, reason: str) -> None:
        entry = self._ledger.get(arrival.migration)
        if entry.phase in UNOWNED:
            entry = await self._ledger.step(entry.id, Step.DISCARD, reason=reason)
            self._publish("migration.discarded", entry.machine, {"migration": entry.id, "peer": entry.peer, "reason": reason})
        if entry.phase is Phase.DISCARDED and not entry.settled:
            arrival.tell()
            await self._remove(arrival)
            await self.end(arrival)

    async def _remove(self, arrival: Arrival) -> None:
        """Ends QEMU and removes all that was made here."""
        machine = arrival.machine
        while machine.alive and not self.closing:
            try:
                await power.kill(machine)
            except QmpdError as error:
                _log.error("what came of a migration cannot be ended yet", extra={"machine": machine.name, "error": error.message})
                await machine.until(AT_REST, AGAIN_S)
        entry = self._ledger.get(arrival.migration)
        await self._reception.discard(self._admissions.delivery(entry, tuple(machine.consoles)))
        await asyncio.to_thread(remove_made, entry.made)
        await self._persist(arrival, lambda: self._ledger.note(arrival.migration, made=()), "to note what was removed")
        if self._registry.known(machine.name) is machine:
            if entry.at_rest:  # its directory has lost the mark when all was there, and without it is nobody's to remove
                place = self._registry.paths(machine.name).state
                await self._persist(arrival, lambda: asyncio.to_thread(mark_unfinished, place), "to mark what is to be removed")
            try:
                await self._registry.dismiss(machine)
            except (QmpdError, OSError) as error:  # only files are left, which the next daemon clears up
                _log.error("rest of a machine that did not come is not removed", extra={"machine": machine.name, "error": str(error)})

    async def end(self, arrival: Arrival) -> None:
        """Nothing is left to be done: lets others at the machine."""
        await self._persist(arrival, lambda: self._ledger.settle(arrival.migration), "to note that all is done")
        self._admissions.forget(arrival.migration)
        self._arrivals.pop(arrival.migration, None)
        arrival.release()
        arrival.tell()


def last_words(machine: Machine) -> str:
    """Why its QEMU ended, as well as that is known."""
    tail = machine.exit.stderr_tail.strip() if machine.exit is not None else ""
    return f"the destination's QEMU ended: {tail.splitlines()[-1]}" if tail else "the destination's QEMU ended"
