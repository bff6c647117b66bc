"""A support bundle: what somebody who helps wants to see of a daemon, without secrets, as an archive that is made while it is sent.

No disk, no kernel and no other file that a definition names is in it, and nothing that a guest printed. Texts and documents are
told by the rule of `disclosure`. What cannot be had, or is too large, is named in `missing.txt`; a bundle is never refused.
"""

from __future__ import annotations

import asyncio
import io
import os
import platform
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import msgspec

from qmpd.capture import stderr_tail
from qmpd.disclosure import told, told_text
from qmpd.doctor import Doctor
from qmpd.errors import QmpdError
from qmpd.inventory import Inventory
from qmpd.jobs import Jobs
from qmpd.journal import Journal, utc_now
from qmpd.logs import recent_lines
from qmpd.machine import Machine
from qmpd.metrics import Metrics
from qmpd.registry import Registry
from qmpd.settings import Settings
from qmpd.views import Version

#: One file of the bundle, and all of them: a host with a thousand machines still fits into a mail.
MEMBER_BYTES: Final = 2 * 2**20
BUNDLE_BYTES: Final = 64 * 2**20
#: The check of a host asks every emulator the first time; all else takes less than a second on a host that works.
MEMBER_DEADLINE_S: Final = 60.0
#: The newest events: what happened before the question came up.
EVENTS: Final = 1000
LIBRARIES: Final = ("aiohttp", "msgspec", "msgpack", "prometheus-client", "qemu.qmp", "google-re2", "click", "rich")

README: Final = """\
This is a support bundle of qmpd. It holds versions, settings, findings, definitions, command lines, events, jobs, metrics, the
daemon's last log lines and the last words of QEMUs. It holds no disk, no kernel, no other file of a machine, and nothing that a guest
printed on its console.

Values whose names look like a secret's (password, token, key, ...) are replaced by ***, in documents and in texts; so are user names
and passwords in addresses, and private keys. A secret without such a name cannot be told from another word: look at what is in here
before you send it to somebody. Names of machines, labels, paths and addresses are in it.

missing.txt says what could not be had, or was too large.
"""

Made = Callable[[], Awaitable[bytes]]


class Bundles:
    """Makes bundles of one daemon."""

    def __init__(
        self,
        *,
        settings: Settings,
        registry: Registry,
        inventory: Inventory,
        journal: Journal,
        jobs: Jobs,
        doctor: Doctor,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._inventory = inventory
        self._journal = journal
        self._jobs = jobs
        self._doctor = doctor
        self._metrics = metrics

    async def pieces(self, daemon: Version) -> AsyncIterator[bytes]:
        """The archive as it is made. `daemon` says who it is."""
        archive = _Archive(f"qmpd-bundle-{utc_now():%Y%m%dT%H%M%SZ}")
        missing: list[str] = []
        left = BUNDLE_BYTES
        yield await archive.add("README.txt", README.encode())
        for name, made in self._members(daemon):
            try:
                async with asyncio.timeout(MEMBER_DEADLINE_S):
                    data = await made()
            except (QmpdError, OSError, TimeoutError) as error:
                missing.append(f"{name}: {told_text(str(error)) or type(error).__name__}")
                continue
            if len(data) > min(MEMBER_BYTES, left):
                missing.append(f"{name}: {len(data)} bytes are too many")
                continue
            left -= len(data)
            yield await archive.add(name, data)
        yield await archive.add("missing.txt", "".join(f"{line}\n" for line in missing).encode())
        yield await archive.end()

    def _members(self, daemon: Version) -> list[tuple[str, Made]]:
        machines = list(self._registry)
        members: list[tuple[str, Made]] = [
            ("versions.json", partial(_versions, daemon)),
            ("settings.json", partial(_document, self._settings)),
            ("doctor.json", self._found),
            ("log.txt", partial(_lines, recent_lines())),
            ("machines.json", partial(_document, [_view(machine) for machine in machines])),
            ("events.jsonl", self._events),
            ("jobs.json", self._all_jobs),
            ("metrics.txt", self._metrics.text),
            ("emulators.json", self._emulators),
            ("check.json", self._check),
        ]
        for machine in machines:
            at = f"machines/{machine.name}"
            members.append((f"{at}/definition.json", partial(_document, machine.definition)))
            if machine.launch is not None:
                members.append((f"{at}/launch.json", partial(_document, machine.launch)))
            members.append((f"{at}/stderr.txt", partial(self._stderr, machine.name)))
        return members

    async def _found(self) -> bytes:
        return await _document(await self._doctor.examine())

    async def _check(self) -> bytes:
        return await _document(await self._inventory.check(self._settings))

    async def _emulators(self) -> bytes:
        return await _document(await self._inventory.emulators())

    async def _all_jobs(self) -> bytes:
        return await _document(await self._jobs.jobs(None))

    async def _events(self) -> bytes:
        newest = await self._journal.last()
        page = await self._journal.page(max(0, newest - EVENTS))
        documents = msgspec.to_builtins(page.events)
        return await asyncio.to_thread(lambda: b"".join(_encoded(event) + b"\n" for event in documents))

    async def _stderr(self, name: str) -> bytes:
        return await _lines((await stderr_tail(self._registry.stderr_path(name))).splitlines())


async def _versions(daemon: Version) -> bytes:
    return await _document({"daemon": daemon, **await asyncio.to_thread(_software)})


def _software() -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "kernel": " ".join(os.uname()),
        "libraries": {name: found for name in LIBRARIES if (found := _version(name)) is not None},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _view(machine: Machine) -> object:
    """A machine as the API shows it, but for what its guest printed."""
    return msgspec.structs.replace(machine.view(), console_line="")


async def _document(value: object) -> bytes:
    return await asyncio.to_thread(_encoded, msgspec.to_builtins(value))


def _encoded(value: object) -> bytes:
    return msgspec.json.encode(told(value))


async def _lines(lines: Sequence[str]) -> bytes:
    """The newest lines that fit."""
    return await asyncio.to_thread(_told_lines, lines)


def _told_lines(lines: Sequence[str]) -> bytes:
    # As one text: a private key goes over several lines.
    return told_text("".join(f"{line}\n" for line in lines)).encode("utf-8", "backslashreplace")[-MEMBER_BYTES:]


class _Archive:
    """A tar archive, compressed; each step returns what is to be sent meanwhile."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._sink = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._sink, mode="w|gz")  # noqa: SIM115  ended by `end`, a generator's caller may never come
        self._moment = int(utc_now().timestamp())

    async def add(self, name: str, data: bytes) -> bytes:
        """Put a file in."""
        return await asyncio.to_thread(self._add, name, data)

    async def end(self) -> bytes:
        """Nothing more comes."""
        await asyncio.to_thread(self._tar.close)
        return self._taken()

    def _add(self, name: str, data: bytes) -> bytes:
        member = tarfile.TarInfo(f"{self._directory}/{name}")
        member.size, member.mtime, member.mode = len(data), self._moment, 0o600
        self._tar.addfile(member, io.BytesIO(data))
        return self._taken()

    def _taken(self) -> bytes:
        data = self._sink.getvalue()
        self._sink.seek(0)
        self._sink.truncate()
        return data
