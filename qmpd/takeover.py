"""Taking over a QEMU that somebody else started: proving what it is, asking it, and making a machine of it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from uuid import uuid4

from qmpd.adoption import NULL_UUID, Described, Subject, described, name_of
from qmpd.catalogue import Catalogue
from qmpd.commandline import qmp_places
from qmpd.errors import AlreadyExists, Forbidden, Held, NotAdoptable, NotFound, Problem, QemuSilent, invalid
from qmpd.facts import MachinePaths
from qmpd.findings import Findings
from qmpd.foreign import connected_pids, lock_owner
from qmpd.hostprocess import HostProcess, is_served, process
from qmpd.inquiry import asked
from qmpd.journal import timestamp
from qmpd.machine import Machine, Publish, now
from qmpd.monitor import Monitor, connected
from qmpd.process import NotOurs, QemuProcess, adopt
from qmpd.processviews import AdoptRequest
from qmpd.record import Adoption, Definition, LaunchRecord, record_of_adopted, write_record
from qmpd.registry import Registry
from qmpd.runlock import lock_paths
from qmpd.session import GREETING_DEADLINE_S
from qmpd.spec import MachineSpec
from qmpd.store import Lost
from qmpd.tasks import undivided

_log = logging.getLogger(__name__)


class Takeover:
    """Adopts QEMUs, one at a time: two requests for the same one must not both succeed."""

    def __init__(self, registry: Registry, catalogue: Catalogue, publish: Publish) -> None:
        self._registry = registry
        self._catalogue = catalogue
        self._publish = publish
        self._turn = asyncio.Lock()

    async def adopt(self, request: AdoptRequest) -> Machine:
        """Makes a machine of a running QEMU. Its guest does not notice; its monitor is ours from then on.

        Raises:
            NotFound: there is no such process, or none at that socket.
            Forbidden: it is another user's.
            NotAdoptable: it is no QEMU, or has no QMP monitor on a Unix socket.
            AlreadyExists: it is one of this daemon's machines already, or the name or UUID is taken.
            Held: another client uses its monitor, or it belongs to a machine of ours that is unreachable.
            MonitorUnavailable, QemuSilent, QemuDied: it cannot be asked.
        """
        if request.pid is None and request.qmp is None:
            raise invalid([Problem(path="$", message="say which QEMU: its pid, or the path of its QMP socket")])
        async with self._turn, AsyncExitStack() as undo:
            found = None if request.pid is None else await self._qemu(request.pid)
            path = request.qmp or (_place(found) if found is not None else "")
            async with _asking(path, found) as monitor:
                found = found or await self._qemu(monitor.peer_pid)
                held = await _held(found)
                undo.callback(held.close)
                findings = await asked(monitor)
            machine, record = await undivided(self._stored(request, path, found, findings), f"adopt:{found.identity.pid}")
            undo.pop_all()  # the machine has it now
            await machine.adopt(record, held, self._registry.paths(machine.name))
        return machine

    async def _qemu(self, pid: int) -> HostProcess:
        ours = connected_pids(self._registry)
        if pid in ours:
            raise AlreadyExists(f"process {pid} is machine {ours[pid]!r} of this daemon", machine=ours[pid])
        locks = {path: machine.name for machine in self._registry for path in lock_paths(self._registry.paths(machine.name).state)}
        return await asyncio.to_thread(_examined, pid, locks)

    async def _stored(self, request: AdoptRequest, path: str, found: HostProcess, findings: Findings) -> tuple[Machine, LaunchRecord]:
        made, moment = self._described(request, found, findings), now()
        adoption = _adoption(made, moment, path, found, findings)
        uuid, name = made.spec.uuid or findings.uuid, made.spec.name
        definition = Definition(spec=made.spec, uuid=uuid, created_at=moment, changed_at=moment, adoption=adoption)
        async with self._registry.reserved(name):
            await asyncio.to_thread(self._registry.check_vacant, name)
            self._check_uuid(uuid)
            try:
                machine = await self._registry.admit(definition)
            except Lost as error:
                raise AlreadyExists(f"there is a machine {name!r} already", machine=name) from error
        self._publish("machine.adopted", name, {"pid": found.identity.pid, "qmp": path, "uuid": uuid, "revision": machine.revision})
        paths = self._registry.paths(name)
        record = record_of_adopted(definition, adoption, paths.run)
        await asyncio.to_thread(_write_down, paths, record)
        return machine, record

    def _described(self, request: AdoptRequest, found: HostProcess, findings: Findings) -> Described:
        subject = Subject(
            findings=findings,
            argv=found.argv,
            directory=found.directory or "/",
            name=name_of(request.name, findings, found.identity.pid),
            uuid=str(uuid4()) if findings.uuid == NULL_UUID else findings.uuid,
        )
        return described(subject, self._catalogue.boards)

    def _check_uuid(self, uuid: str) -> None:
        for machine in self._registry:
            if machine.definition.uuid == uuid:
                raise AlreadyExists(f"machine {machine.name!r} has the UUID {uuid} already", machine=machine.name)


def startable(definition: Definition) -> MachineSpec:
    """The definition a machine is launched from. Raises Invalid when it is that of an adopted QEMU, parts of which it does not say."""
    unknown = definition.adoption.unknown if definition.adoption is not None else ()
    if unknown:
        message = "was adopted with this part, which its definition does not say; replace the definition before the machine is started: "
        raise invalid([Problem(path="$", message=message + part) for part in unknown])
    return definition.spec


def _examined(pid: int, locks: Mapping[str, str]) -> HostProcess:
    found = process(pid)
    if found is None:
        raise NotFound(f"there is no process {pid}", pid=pid)
    if os.geteuid() not in {0, found.uid}:
        raise Forbidden(f"process {pid} belongs to {found.user}; this daemon may take over only its own user's", pid=pid)
    owner = lock_owner(pid, locks)
    if owner is not None:
        raise Held(f"process {pid} is the QEMU of machine {owner!r}: reattach that", holder=owner)
    if not found.is_qemu:
        raise NotAdoptable(f"process {pid} is {Path(found.program).name}, which is no qemu-system emulator", pid=pid)
    return found


def _place(found: HostProcess) -> str:
    """The first QMP socket that the command line names."""
    places = qmp_places(found.argv, found.directory or "/")
    for place in places:
        if place.path is not None:
            return place.path
    pid = found.identity.pid
    if places:
        others = ", ".join(place.described for place in places)
        raise NotAdoptable(f"the QMP monitor of process {pid} is on {others}; qmpd needs one on a Unix socket", pid=pid)
    raise NotAdoptable(f"process {pid} has no QMP monitor on its command line; say --qmp PATH if it has one all the same", pid=pid)


@asynccontextmanager
async def _asking(path: str, found: HostProcess | None) -> AsyncIterator[Monitor]:
    if await asyncio.to_thread(is_served, path):
        raise Held(f"the monitor at {path} has a client already, and serves one at a time: end that first", holder="another client")
    pid = found.identity.pid if found is not None else None
    try:
        async with connected(path, name=path, peer_pid=pid, deadline_s=GREETING_DEADLINE_S) as monitor:
            yield monitor
    except QemuSilent as error:
        if "answer" in error.details:  # it does, and makes no sense
            raise
        now_is = await asyncio.to_thread(process, pid) if pid is not None else None
        halted = now_is is not None and now_is.halted
        why = "its process is stopped" if halted else "another client uses it, or QEMU's main loop is blocked"
        raise QemuSilent(f"the monitor at {path} does not answer: {why}") from error


async def _held(found: HostProcess) -> QemuProcess:
    try:
        return await adopt(found.identity)
    except NotOurs as error:
        raise NotFound(str(error), pid=found.identity.pid) from error


def _adoption(made: Described, moment: str, path: str, found: HostProcess, findings: Findings) -> Adoption:
    return Adoption(
        at=moment,
        identity=found.identity,
        qmp=path,
        uuid=findings.uuid,
        accel="kvm" if findings.kvm else "tcg",
        emulator=found.program,
        emulator_version=findings.version,
        machine=findings.machine,
        started_at=timestamp(found.started_at),
        fixed=made.fixed,
        unknown=made.unknown,
    )


def _write_down(paths: MachinePaths, record: LaunchRecord) -> None:
    try:
        for directory in (paths.run, paths.state):
            Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        write_record(paths.run, record)
    except OSError as error:
        # The definition says who the process is, too.
        _log.warning("launch record was not written", extra={"directory": paths.run, "error": str(error)})
