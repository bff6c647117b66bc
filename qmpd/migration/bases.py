"""What lies below the disks of machines: an image that both hosts have need not be sent, and a digest says whether they have the same.

A base of many gigabytes is read once, in the background, and known until it changes: by all machines upon it, and by the next daemon too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from qmpd import factcache
from qmpd.errors import CannotMove, HostError, NotYet, QmpdError
from qmpd.migration.extents import allocated, fingerprint
from qmpd.migration.likeness import BaseThere
from qmpd.migration.protocol import BaseOffer
from qmpd.spec import BaseImage
from qmpd.storage import backing_elsewhere, examine
from qmpd.tasks import Tasks

#: How long a peer's question waits for a digest that is being made, and is told to ask again.
PATIENCE_S: Final = 5.0
#: Times of files are as exact as the kernel's clock ticks: one that was just written to may be so again without looking younger.
TICK_NS: Final = 2_000_000_000
#: A base that is written to over and over is none.
ATTEMPTS: Final = 3
#: So many are remembered: the oldest are forgotten, and read again when they are needed.
REMEMBERED: Final = 1_000
#: In the cache directory.
FILE: Final = "bases.msgpack"

_log = logging.getLogger(__name__)


class _Look(msgspec.Struct, frozen=True, kw_only=True):
    """What a file looked like: if this is unchanged, so is what is in it."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class _Known(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    look: _Look
    digest: str


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    known: list[_Known] = []


class Bases:
    """The bases of one host. Nothing outside of `pools` is read for a peer."""

    def __init__(self, tasks: Tasks, pools: tuple[str, ...], cache_dir: str) -> None:
        self._tasks = tasks
        self._pools = pools
        self._cache = Path(cache_dir) / FILE
        self._known: dict[str, _Known] | None = None
        self._reading: dict[str, asyncio.Task[str | QmpdError]] = {}
        #: One after the other: two at a time would only be slower, and those of machines that run come first.
        self._turn = asyncio.Lock()

    async def offered(self, base: BaseImage, there: str | None) -> BaseOffer:
        """What a peer is told of a base and all below it; `there` is where it has to look, if not at the same path. Waits until it is read.

        Raises:
            HostError: it cannot be read.
        """
        path = await asyncio.to_thread(os.path.realpath, base.path)
        digest = await self._digest(path)
        if isinstance(digest, QmpdError):
            raise digest
        if digest is None:
            raise HostError(f"{path} was not read to its end", path=path)
        look, used = await asyncio.to_thread(_sizes, path)
        offer = BaseOffer(path=there or base.path, format=base.format, size=look.size, used_bytes=used, digest=digest)
        if base.base is None:
            return offer
        below = await self.offered(base.base, await asyncio.to_thread(_leads_to, base.path, offer.path))
        return msgspec.structs.replace(offer, used_bytes=used + below.used_bytes, below=below)

    async def found(self, wanted: BaseOffer) -> BaseThere:
        """What is here in place of a peer's base, and of what lies below that.

        Raises:
            NotYet: it is being read.
        """
        for layer in wanted.layers():
            there = await self._found(layer)
            if not there.same:
                below = "" if layer is wanted else f"below it, of {layer.path}: "
                return BaseThere(path=wanted.path, same=False, why=f"{below}{there.why}")
        return BaseThere(path=wanted.path, same=True)

    async def _found(self, wanted: BaseOffer) -> BaseThere:
        """One layer alone."""
        looked = (await asyncio.to_thread(examine, [wanted.path], self._pools))[wanted.path]
        refusal = looked.refusal if wanted.below is None or looked.backing is None else None
        why = refusal or {"denied": "permission denied", "missing": "there is no such file"}.get(looked.kind, "")
        if not why and (looked.kind != "file" or not looked.readable):
            why = "it is no file that can be read"
        elif not why and looked.size != wanted.size:
            why = f"it has {looked.size} bytes, and {wanted.size} at the source"
        elif not why and wanted.below is not None and looked.backing != await asyncio.to_thread(os.path.realpath, wanted.below.path):
            why = f"it lies upon {looked.backing or 'nothing'} here, and was to lie upon {wanted.below.path}"
        if why:
            return BaseThere(path=wanted.path, same=False, why=why)
        digest = await self._digest(looked.real_path, PATIENCE_S)
        if digest is None:
            raise NotYet(f"{wanted.path} is being read, to compare it with the source's", path=wanted.path)
        if isinstance(digest, QmpdError):
            return BaseThere(path=wanted.path, same=False, why=digest.message)
        return BaseThere(path=wanted.path, same=digest == wanted.digest, why="" if digest == wanted.digest else "it has other contents")

    async def check(self, wanted: Sequence[BaseOffer]) -> None:
        """For bases that were the same: raises CannotMove if somebody has changed one of them since. Reads none."""
        for base in (layer for each in wanted for layer in each.layers()):
            path = await asyncio.to_thread(os.path.realpath, base.path)
            if await asyncio.to_thread(self._remembered, path) != base.digest:
                raise CannotMove(f"{base.path} was changed since it was compared with the source's", path=base.path)

    async def _digest(self, path: str, patience_s: float | None = None) -> str | QmpdError | None:
        """The digest of a file; None where it takes longer."""
        known = await asyncio.to_thread(self._remembered, path)
        if known is not None:
            return known
        reading = self._reading.get(path)
        if reading is None:
            reading = self._reading[path] = self._tasks.start(self._read(path), f"base:{path}")
        await asyncio.wait([reading], timeout=patience_s)  # goes on where nobody waits any more
        return reading.result() if reading.done() and not reading.cancelled() else None

    def _remembered(self, path: str) -> str | None:
        """What is known of a file that has not changed since. Blocks."""
        if self._known is None:
            kept = factcache.read(self._cache, _Kept)
            self._known = {known.path: known for known in kept.known} if kept is not None else {}
        known = self._known.get(path)
        try:
            return known.digest if known is not None and known.look == _look(path) else None
        except OSError:
            return None

    async def _read(self, path: str) -> str | QmpdError:
        try:
            async with self._turn:
                return await self._settled_digest(path)
        except OSError as error:
            return HostError(f"{path} cannot be read: {error.strerror or error}", path=path)
        finally:
            self._reading.pop(path, None)

    async def _settled_digest(self, path: str) -> str | QmpdError:
        for _ in range(ATTEMPTS):
            before = await asyncio.to_thread(_look, path)
            age = time.time_ns() - max(before.mtime_ns, before.ctime_ns)
            if 0 <= age < TICK_NS:
                await asyncio.sleep((TICK_NS - age) / 1e9)
            digest = await fingerprint(path)
            if await asyncio.to_thread(_look, path) == before:
                await asyncio.to_thread(self._remember, _Known(path=path, look=before, digest=digest))
                return digest
        return HostError(f"{path} is written to while it is read", path=path)

    def _remember(self, known: _Known) -> None:
        """Blocks."""
        everything = {path: other for path, other in (self._known or {}).items() if path != known.path} | {known.path: known}
        self._known = dict(list(everything.items())[-REMEMBERED:])
        try:
            factcache.write(self._cache, _Kept(known=list(self._known.values())))
        except OSError as error:
            _log.warning("what a base contains is not kept, and will be read again", extra={"path": known.path, "error": str(error)})


def _look(path: str) -> _Look:
    status = Path(path).stat()
    return _Look(device=status.st_dev, inode=status.st_ino, size=status.st_size, mtime_ns=status.st_mtime_ns, ctime_ns=status.st_ctime_ns)


def _leads_to(path: str, there: str) -> str | None:
    """Where what an image lies upon has to be, were the image not at `path` but `there`. None: at the same place. Blocks."""
    led = backing_elsewhere(path, there)
    return None if led == backing_elsewhere(path, path) else led


def _sizes(path: str) -> tuple[_Look, int]:
    return _look(path), allocated(path)
