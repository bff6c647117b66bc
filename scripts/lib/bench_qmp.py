"""One QMP command over the API and back, against the same over a raw QMP socket."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from qmpd_api.client import Client, QmpStream
from scripts.lib.bench_daemon import Bench, small_pc
from scripts.lib.bench_figures import Row, paired
from scripts.lib.bench_floor import DEADLINE_S, ByHand, command_line
from scripts.lib.bench_libvirt import Libvirt
from scripts.lib.progress import say

#: Round trips are short: each sample is a mean of so many, taken in turn.
BLOCK: Final = 50
PAIRS: Final = 40
BAR: Final = 3.0
COMMAND: Final = "query-status"
NAME: Final = "qmp"


async def measure(bench: Bench) -> list[Row]:
    """The machines are halted, so no guest is in the way. The API is asked over one kept connection, as any HTTP client does."""
    floor, ours, client, session = [], [], [], []
    libvirt: Sequence[float] = []
    async with bench.daemon() as daemon:
        argv = await command_line(daemon.client, small_pc(NAME))
        await daemon.client.create(small_pc(NAME), start=True, paused=True)
        with ByHand(argv, halted=True) as qemu, closing(RawHttp(daemon.directory / "qmpd.sock")) as http:
            http.post(f"/v1/machines/{NAME}/qmp", {"execute": COMMAND})
            async with daemon.client.qmp_session(NAME) as stream:
                for _ in range(bench.repeat or PAIRS):
                    floor.append(await asyncio.to_thread(_raw, qemu))
                    session.append(await _session(stream))
                    ours.append(await asyncio.to_thread(_http, http))
                    client.append(await _python(daemon.client))
        if bench.libvirt is not None:
            libvirt = await asyncio.to_thread(_by_libvirt, bench.libvirt, bench.repeat or PAIRS)
    say(f"  {len(floor)} times {BLOCK} round trips each")
    return [
        paired("qmp", "QMP pass-through, round trip in a session", ours=session, floor=floor, libvirt=libvirt, times=BAR, unit="us"),
        paired("qmp", "  the same, a request each", ours=ours, floor=floor, times=BAR, unit="us"),
        paired("qmp", "  the same with the Python client", ours=client, floor=floor, unit="us"),
    ]


class RawHttp:
    """The least an HTTP client can be: one connection, requests and answers of known length, one after the other."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(DEADLINE_S)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rb")

    def post(self, path: str, document: object) -> bytes:
        """The answer's body. Raises RuntimeError for any status but 200."""
        body = json.dumps(document)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._socket.sendall((head + body).encode())
        status = self._stream.readline()
        length = 0
        while (line := self._stream.readline()) not in {b"\r\n", b""}:
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        answer = self._stream.read(length)
        if b" 200 " not in status:
            raise RuntimeError(f"{path}: {status!r} {answer!r}")
        return answer

    def close(self) -> None:
        """Hang up."""
        self._stream.close()
        self._socket.close()


def _raw(qemu: ByHand) -> float:
    began = time.perf_counter()
    for _ in range(BLOCK):
        qemu.execute(COMMAND)
    return _each(began)


def _http(http: RawHttp) -> float:
    began = time.perf_counter()
    for _ in range(BLOCK):
        http.post(f"/v1/machines/{NAME}/qmp", {"execute": COMMAND})
    return _each(began)


async def _session(stream: QmpStream) -> float:
    began = time.perf_counter()
    for _ in range(BLOCK):
        await stream.execute(COMMAND)
    return _each(began)


async def _python(client: Client) -> float:
    began = time.perf_counter()
    for _ in range(BLOCK):
        await client.qmp(NAME, COMMAND)
    return _each(began)


def _by_libvirt(libvirt: Libvirt, blocks: int) -> Sequence[float]:
    command = f"qemu-monitor-command {NAME} '{json.dumps({'execute': COMMAND})}'"
    with libvirt.shell() as virsh:
        virsh.run(f"create {libvirt.domain(NAME)} --paused")
        try:
            times = []
            for _ in range(blocks):
                began = time.perf_counter()
                for _ in range(BLOCK):
                    virsh.run(command)
                times.append(_each(began))
            return times
        finally:
            virsh.run(f"destroy {NAME}")


def _each(began: float) -> float:
    return (time.perf_counter() - began) / BLOCK * 1e6
