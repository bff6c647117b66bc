"""Fixtures of the API tests: a bench, a socket on which it answers, and a client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest
from blockbuster import blockbuster_ctx

from qmpd_api.application import create
from qmpd_api.limits import Limits
from qmpd_api.server import serve
from tests.api.bench import Bench, opened_bench

Server = Callable[[Limits], Awaitable[str]]


@pytest.fixture(autouse=True)
def _no_blocking_calls() -> Iterator[None]:
    """Fails a test in which the server or the client blocks the event loop."""
    with blockbuster_ctx("qmpd_api") as buster:
        # The metrics of the process itself come from /proc, which answers from memory.
        for function in ("io.BufferedReader.read", "os.listdir"):
            if function in buster.functions:
                buster.functions[function].can_block_in("prometheus_client/process_collector.py", "collect")
        yield


@pytest.fixture
async def bench(short_directory: Path) -> AsyncIterator[Bench]:
    """A service without QEMU."""
    async with opened_bench(short_directory) as opened:
        yield opened


@pytest.fixture
async def start_server(bench: Bench, short_directory: Path) -> AsyncIterator[Server]:
    """Serves the bench with other limits; returns the socket's path."""
    async with AsyncExitStack() as stack:

        async def starter(limits: Limits) -> str:
            path = str(short_directory / "limited.sock")
            await stack.enter_async_context(serve(create(bench.as_service(), limits), path))
            return path

        yield starter


@pytest.fixture
async def socket_path(bench: Bench, short_directory: Path) -> AsyncIterator[str]:
    """The path of a socket on which the bench answers."""
    path = str(short_directory / "api.sock")
    async with serve(create(bench.as_service()), path):
        yield path


@pytest.fixture
async def client(socket_path: str) -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client of the bench."""
    async with aiohttp.ClientSession("http://localhost", connector=aiohttp.UnixConnector(socket_path)) as session:
        yield session
