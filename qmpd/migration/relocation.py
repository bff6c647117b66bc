"""A disk of a running guest moves to another file of this host: copied, and then used in place of the old one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final

from qmpd.errors import MigrationFailed, QemuRefused
from qmpd.migration.blockjobs import Job, concluded, jobs, words
from qmpd.migration.progress import DiskProgress
from qmpd.migration.qemu import Qemu, has_command, run_state
from qmpd.migration.watch import Watch, watching

#: The names of the jobs; a disk moves once at a time.
PREFIX: Final = "qmpd-relocation"
#: A command since QEMU 10.0, the first for which the change under a guest that writes was seen to be safe.
_SAFE: Final = "blockdev-set-active"
#: A copy within the host that does not move for so long: its storage is gone.
STALL_LIMIT_S: Final = 120.0


async def relocate(
    qemu: Qemu,
    node: str,
    target: Mapping[str, object],
    report: Callable[[DiskProgress], Awaitable[None]],
    *,
    bytes_per_s: int | None = None,
    top: bool = False,
) -> None:
    """Copies the disk of `node` to `target` (arguments of `blockdev-add`, with a `node-name`, of an image that is there and as long).

    When it returns the guest uses `target`, and everything that was written is in it; `node` is in nobody's use and can be deleted.
    Whatever else happens, the guest goes on with `node`, and `target` is not attached any more; only after a cancellation while QEMU
    changes over it may be the other way round. With `top` only the top layer is copied, onto what is below it in `target` as well.

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
        await _finish(qemu, job, node, report)
    except BaseException:
        await _undo(qemu, job, name)
        raise


async def _finish(qemu: Qemu, job: str, node: str, report: Callable[[DiskProgress], Awaitable[None]]) -> None:
    with watching(qemu) as watch:
        await _until_ready(qemu, job, node, watch, report)
        async with _quiet(qemu):
            await qemu.execute("job-complete", {"id": job})
            ended = await concluded(qemu, job, watch)
    if ended is None or ended.error is not None:
        raise MigrationFailed(f"disk {node!r} could not be moved: {words(ended)}", node=node)
    await qemu.execute("job-dismiss", {"id": job})


@asynccontextmanager
async def _quiet(qemu: Qemu) -> AsyncIterator[None]:
    """Halts the guest for the moment of the change, where QEMU needs that: 7.2 aborts when a write comes in between."""
    if await has_command(qemu, _SAFE) or await run_state(qemu) != "running":
        yield
        return
    await qemu.execute("stop")
    try:
        yield
    finally:
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


async def _undo(qemu: Qemu, job: str, target: str) -> None:
    with watching(qemu) as watch:
        there = (await jobs(qemu)).get(job)
        if there is not None and there.status != "concluded":
            with suppress(QemuRefused):  # it ended just now
                await qemu.execute("block-job-cancel", {"device": job, "force": True})
        if there is not None and await concluded(qemu, job, watch) is not None:
            await qemu.execute("job-dismiss", {"id": job})
    with suppress(QemuRefused):  # after a move that succeeded and was not seen to, it is in use
        await qemu.execute("blockdev-del", {"node-name": target})
