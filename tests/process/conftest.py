"""Fixtures of the process tests: a short directory, emulators and children that end with their test."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from qmpd.process import Identity, NotOurs, QemuProcess, gate, launch
from tests.process.emulator import PATIENCE_S, Emulators, emulators_in, unrecorded

Starter = Callable[..., Awaitable[QemuProcess]]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory whose name leaves room for socket paths, which tmp_path does not."""
    path = Path(tempfile.mkdtemp(prefix="q"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def emulators(directory: Path) -> AsyncIterator[Emulators]:
    """Starts QEMUs; kills them at the end."""
    async with emulators_in(directory) as started:
        yield started


@pytest.fixture
async def start(directory: Path) -> AsyncIterator[Starter]:
    """Launches any program through the gate; kills it at the end."""
    started: list[QemuProcess] = []

    async def starter(
        *argv: str, cwd: str = "/", record: Callable[[Identity], None] = unrecorded, stderr: Path = directory / "stderr"
    ) -> QemuProcess:
        process = await launch(partial(gate, argv, inherited=(), cwd=cwd, stderr=str(stderr), record=record))
        started.append(process)
        return process

    yield starter
    for process in started:
        process.signal(signal.SIGKILL)
        with contextlib.suppress(NotOurs):  # closed by the test
            async with asyncio.timeout(PATIENCE_S):
                await process.wait()


@pytest.fixture
def few_descriptors() -> Iterator[Callable[[int], None]]:
    """Lowers this process's limit of open files to so many more than are open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(more: int) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free_descriptor() + more, hard))

    yield allow
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def lowest_free_descriptor() -> int:
    """The number the next open would get, if all lower ones are taken."""
    with Path("/dev/null").open("rb") as probe:
        return probe.fileno()
