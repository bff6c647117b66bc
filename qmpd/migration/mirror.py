"""Disks that are copied while their guest runs: to another host along with its memory, or to another file here.

A disk is copied by a job that stays behind the guest's writes, and is caught up with when the guest is halted. QEMU could do each write
twice before the guest hears of it (`write-blocking`), and so keep the guest from running ahead, but 7.2 and 10.0 corrupt their own
memory when such a copy is given up or fails while a write is under way: a migration that fails would end the guest.

What QEMU waits for when the other end stands still cannot be cancelled, only broken, with `yank`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from qmpd.errors import MigrationFailed, QemuRefused, QemuSilent
from qmpd.migration import tls
from qmpd.migration.addresses import Address, socket_address
from qmpd.migration.blockjobs import Job, concluded, words
from qmpd.migration.blockjobs import jobs as current_jobs
from qmpd.migration.progress import DiskProgress
from qmpd.migration.qemu import IMPATIENT_S, PREFIX, Qemu, ask_list, execute_or_yank, yank
from qmpd.migration.tls import ClientTls
from qmpd.migration.watch import Watch, watching
from qmpd.plan.disks import base_node
from qmpd.spec import BaseImage, DiskFormat

#: A copy that is behind and does not move for so long is given up, and one that has not caught up with a halted guest by then.
STALL_LIMIT_S: Final = 20.0
#: A job that was told to end, and whose connection was broken, has nothing left to wait for.
END_LIMIT_S: Final = 60.0
#: A server that does not greet us by then is not there. QEMU waits for it with its whole main loop, and `yank` cannot help yet.
OPEN_LIMIT_S: Final = 5
#: Then it says so itself, a moment later.
OPEN_DEADLINE_S: Final = 15.0

#: It goes with the last request that went through it.
FILTER_LIMIT_S: Final = 2.0
#: What a job puts between a disk and its guest while it lasts is called after it, with this.
_FILTER: Final = "-filter"

_log = logging.getLogger(__name__)


class DiskCopy(msgspec.Struct, frozen=True, kw_only=True):
    """A disk to copy: its node, the export it goes to, and whether the other end has all that is below the top layer already.

    With `path` it goes to that file of this host, an image of `format` that is there and as long, and lies upon `base` if there is one;
    `export` is what it is called then.
    """

    node: str
    export: str
    top: bool = False
    path: str | None = None
    format: DiskFormat = "raw"
    base: BaseImage | None = None


class Mirrors:
    """The disks of one guest, copied to one NBD server, or to files. Jobs and nodes have names that whoever tidies up finds.

    A server at a Unix socket must be one that its owner closes before `drop_all`: QEMU does not hear that its own end was shut down
    (`yank`) while a full one does not take what it writes, and turns round and round in place of that. TCP has no such trouble.
    """

    def __init__(
        self, qemu: Qemu, disks: Sequence[DiskCopy], at: Address | None, credentials: ClientTls | None, *, prefix: str = PREFIX
    ) -> None:
        self._qemu = qemu
        self._disks = {f"{prefix}-{index}": disk for index, disk in enumerate(disks)}
        self._at = at
        self._tls = credentials
        self._moved: dict[str, tuple[int, float]] = {}

    def __bool__(self) -> bool:
        return bool(self._disks)

    async def begin(self, bytes_per_s: int | None) -> None:
        """Connects to the server and starts to copy.

        Raises:
            QemuRefused: the server is not there, does not admit us, or has not what is expected.
            QemuSilent: it does not answer; the connection was broken.
        """
        if self._at is None and any(disk.path is None for disk in self._disks.values()):
            raise MigrationFailed("disks are to be copied, and there is no address to copy them to")
        for name, disk in self._disks.items():
            await self._qemu.execute("blockdev-add", self._target(name, disk), deadline_s=OPEN_DEADLINE_S)
            job: dict[str, object] = {
                "job-id": name,
                "device": disk.node,
                "target": name,
                "sync": "top" if disk.top else "full",
                "auto-dismiss": False,
                "filter-node-name": f"{name}{_FILTER}",
            }
            job |= {"copy-mode": "background", "speed": bytes_per_s or 0}
            await execute_or_yank(self._qemu, "blockdev-mirror", job)

    async def until_following(self, watch: Watch) -> tuple[DiskProgress, ...] | None:
        """Waits for the next news; None when every copy has caught up with its guest and follows it.

        Raises:
            MigrationFailed: a copy failed, or stands still.
        """
        jobs = await self.check()
        if jobs and all(job.status == "ready" for job in jobs.values()):
            return None
        await watch.wake()
        return self.progress(jobs)

    async def check(self) -> dict[str, Job]:
        """The jobs; raises MigrationFailed as `until_following`."""
        jobs = await current_jobs(self._qemu)
        now = asyncio.get_running_loop().time()
        for name, disk in self._disks.items():
            job = jobs.get(name)
            if job is None or job.status in {"concluded", "aborting", "null"}:
                raise MigrationFailed(f"the copy of disk {disk.node!r} ended: {words(job)}", node=disk.node)
            done, since = self._moved.get(name, (-1, now))
            if job.done != done or not job.behind:
                self._moved[name] = (job.done, now)
            elif now - since > STALL_LIMIT_S:
                raise MigrationFailed(f"the copy of disk {disk.node!r} stood still for {STALL_LIMIT_S:g} s", node=disk.node)
        return {name: jobs[name] for name in self._disks}

    def progress(self, jobs: Mapping[str, Job]) -> tuple[DiskProgress, ...]:
        """The jobs as figures."""
        return tuple(
            DiskProgress(node=disk.export, done_bytes=jobs[name].done, total_bytes=jobs[name].total, ready=jobs[name].status == "ready")
            for name, disk in self._disks.items()
            if name in jobs
        )

    async def set_speed(self, bytes_per_s: int | None) -> None:
        """Changes the limit of each copy."""
        for name in self._disks:
            await self._qemu.execute("block-job-set-speed", {"device": name, "speed": bytes_per_s or 0})

    async def finish(self) -> None:
        """While the guest is halted: every copy is made complete and let go of, the guest's disks stay what they were.

        Raises:
            MigrationFailed: a copy could not be completed in time.
        """
        for name, disk in self._disks.items():
            # Not `job-cancel`, which throws away what is not written yet.
            try:
                await execute_or_yank(self._qemu, "block-job-cancel", {"device": name})
            except QemuRefused as error:
                ended = words((await current_jobs(self._qemu)).get(name))
                raise MigrationFailed(f"the copy of disk {disk.node!r} was not completed: {ended}", node=disk.node) from error
        with watching(self._qemu) as watch:
            try:
                async with asyncio.timeout(STALL_LIMIT_S):
                    for name, disk in self._disks.items():
                        job = await concluded(self._qemu, name, watch)
                        if job is None or job.error is not None:
                            raise MigrationFailed(f"the copy of disk {disk.node!r} was not completed: {words(job)}", node=disk.node)
            except TimeoutError as error:
                raise MigrationFailed(f"the copies of the disks were not complete within {STALL_LIMIT_S:g} s") from error
        for name in self._disks:
            await self._qemu.execute("job-dismiss", {"id": name})
            await execute_or_yank(self._qemu, "blockdev-del", {"node-name": name})

    def _target(self, name: str, disk: DiskCopy) -> dict[str, object]:
        if disk.path is not None:  # with `discard` a hole stays one
            file = {"driver": "file", "filename": disk.path, "discard": "unmap"}
            below = {"backing": base_node(disk.base)} if disk.base is not None else {}
            return {"driver": disk.format, "node-name": name, "discard": "unmap", "file": file, **below}
        if self._at is None:
            raise MigrationFailed("there is no address to copy disks to")
        target: dict[str, object] = {"driver": "nbd", "node-name": name, "server": socket_address(self._at), "export": disk.export}
        target["open-timeout"] = OPEN_LIMIT_S
        if self._tls is not None:
            target |= {"tls-creds": tls.CREDENTIALS, "tls-hostname": self._tls.hostname}
        return target


async def drop_all(qemu: Qemu, prefix: str = PREFIX) -> None:
    """Ends every copy for a migration, or with names like `prefix`, whatever it waits for: no job and no node of one is left, the guest's
    disks are what they were.

    Raises:
        MigrationFailed: a job did not end, even without its connection.
    """
    with watching(qemu) as watch:
        try:
            async with asyncio.timeout(END_LIMIT_S):
                for name, job in (await current_jobs(qemu)).items():
                    if name.startswith(prefix):
                        await _end(qemu, name, job, watch)
        except TimeoutError as error:
            raise MigrationFailed(f"the copies of the disks did not end within {END_LIMIT_S:g} s") from error
        filters = await _filters_gone(qemu, watch, prefix)
    for name in await _nodes(qemu, prefix) - filters:
        await qemu.execute("blockdev-del", {"node-name": name})


async def _filters_gone(qemu: Qemu, watch: Watch, prefix: str) -> frozenset[str]:
    """Waits for what the jobs had put above the disks, which goes a moment after them. Returns what does not go.

    QEMU 7.2 forgets one now and then when a copy is given up: it is out of the guest's way, but its disk cannot be copied any more.
    """
    left: frozenset[str] = frozenset()
    try:
        async with asyncio.timeout(FILTER_LIMIT_S):
            while left := frozenset(name for name in await _nodes(qemu, prefix) if name.endswith(_FILTER)):
                await watch.wake()
    except TimeoutError:
        _log.warning("QEMU keeps a filter that is of no use any more", extra={"nodes": sorted(left)})
    return left


async def _end(qemu: Qemu, name: str, job: Job, watch: Watch) -> None:
    if job.status != "concluded":
        with suppress(QemuRefused):  # it ended just now
            try:
                await execute_or_yank(qemu, "block-job-cancel", {"device": name, "force": True})
            except QemuSilent:
                _log.warning("the other end of a copy stands still", extra={"job": name})
    try:
        async with asyncio.timeout(IMPATIENT_S):
            ended = await concluded(qemu, name, watch)
    except TimeoutError:
        await yank(qemu)
        ended = await concluded(qemu, name, watch)
    if ended is not None:
        await qemu.execute("job-dismiss", {"id": name})


async def _nodes(qemu: Qemu, prefix: str) -> frozenset[str]:
    nodes = await ask_list(qemu, "query-named-block-nodes", {"flat": True})
    return frozenset(name for node in nodes if (name := str(node.get("node-name"))).startswith(prefix))
