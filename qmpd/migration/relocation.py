"""A disk of a running guest moves to another file of this host: copied, and then used in place of the old one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final

from qmpd.errors import MigrationFailed, QemuRefused
from qmpd.migration.blockjobs import Job, concluded, jobs, words
from qmpd.migration.progress import DiskProgress
from qmpd.migration.qemu import Qemu, run_state
from qmpd.migration.watch import Watch, watching
from qmpd.tasks import undivided

#: The names of the jobs; a disk moves once at a time.
PREFIX: Final = "qmpd-relocation"
#: A copy within the host that does not move for so long: its storage is gone.
STALL_LIMIT_S: Final = 120.0

Step = Callable[[], Awaitable[None]]


async def _nothing() -> None:
    """Nobody has anything to do."""


async def relocate(
    qemu: Qemu,
    node: str,
    target: Mapping[str, object],
    report: Callable[[DiskProgress], Awaitable[None]],
    *,
    halting: Step = _nothing,
    changed: Step = _nothing,
    bytes_per_s: int | None = None,
    top: bool = False,
) -> None:
    """Copies the disk of `node` to `target` (arguments of `blockdev-add`, with a `node-name`, of an image that is there and as long).

    When it returns the guest uses `target`, and everything that was written is in it; `node` is in nobody's use and can be deleted.
    Whatever else happens, the guest goes on with `node`, and `target` is not attached any more; only after a cancellation while QEMU
    changes over it may be the other way round. With `top` only the top layer is copied, onto what is below it in `target` as well.
    `halting` comes before the guest is halted for the change, `changed` when it uses the new image and stands still; after an error of
    `changed` it stays halted.

    Raises:
        MigrationFailed: the copy failed or stood still.
        QemuRefused: there is no such node, or the target cannot be opened or is shorter.
    """
    name = str(target["node-name"])
    job = f"{PREFIX}-{node}"
    arguments: dict[str, object] = {"job-id": job, "device": node, "target": name, "auto-dismiss": False}
    arguments |= {"sync": "top" if top else "full", "speed": bytes_per_s or 0}
    await qemu.execute("blockdev-add", target)
    try:
        await qemu.execute("blockdev-mirror", arguments)
        with watching(qemu) as watch:
            await _until_ready(qemu, job, node, watch, report)
        await halting()
        await undivided(_change_over(qemu, job, node, changed), f"change-over:{node}")
    except BaseException:
        await undo(qemu, node, name)
        raise


async def _change_over(qemu: Qemu, job: str, node: str, changed: Step) -> None:
    """Halts the guest for the change: 7.2 aborts when a write comes in between, and what `changed` writes down must come first."""
    ran = await run_state(qemu) == "running"
    if ran:
        await qemu.execute("stop")
    try:
        with watching(qemu) as watch:
            await qemu.execute("job-complete", {"id": job})
            ended = await concluded(qemu, job, watch)
    except QemuRefused:  # the guest has its old disk
        if ran:
            await qemu.execute("cont")
        raise
    if ended is None or ended.error is not None:
        if ran:
            await qemu.execute("cont")
        raise MigrationFailed(f"disk {node!r} could not be moved: {words(ended)}", node=node)
    await changed()
    await qemu.execute("job-dismiss", {"id": job})
    if ran:
        await qemu.execute("cont")


async def _until_ready(qemu: Qemu, name: str, node: str, watch: Watch, report: Callable[[DiskProgress], Awaitable[None]]) -> None:
    loop = asyncio.get_running_loop()
    seen, since = -1, loop.time()
    while True:
        job: Job | None = (await jobs(qemu)).get(name)
        if job is None or job.status in {"concluded", "aborting"}:
            raise MigrationFailed(f"disk {node!r} could not be copied: {words(job)}", node=node)
        await report(DiskProgress(node=node, done_bytes=job.done, total_bytes=job.total, ready=job.status == "ready"))
        if job.status == "ready":
            return
        if job.done != seen or not job.behind:
            seen, since = job.done, loop.time()
        elif loop.time() - since > STALL_LIMIT_S:
            raise MigrationFailed(f"the copy of disk {node!r} stood still for {STALL_LIMIT_S:g} s", node=node)
        await watch.wake()


async def undo(qemu: Qemu, node: str, target: str) -> None:
    """Ends the move of a disk to the node `target`, wherever it is. Which one the guest has then is to be asked."""
    job = f"{PREFIX}-{node}"
    with watching(qemu) as watch:
        there = (await jobs(qemu)).get(job)
        if there is not None and there.status != "concluded":
            with suppress(QemuRefused):  # it ended just now
                await qemu.execute("block-job-cancel", {"device": job, "force": True})
        if there is not None and await concluded(qemu, job, watch) is not None:
            await qemu.execute("job-dismiss", {"id": job})
    with suppress(QemuRefused):  # after a move that succeeded and was not seen to, it is in use
        await qemu.execute("blockdev-del", {"node-name": target})
