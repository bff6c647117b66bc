"""A peer on a real Unix socket that greets like QEMU, and then says and does whatever a test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Self

GREETING = {"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}


class Peer:
    """Serves one client at a time. `received` holds its commands after negotiation, in order of arrival; `greeted` counts clients."""

    def __init__(self, path: str, greeting: bytes | None, refusals: Sequence[bytes]) -> None:
        self.path = path
        self.greeted = 0
        self.received: asyncio.Queue[dict[str, object]] = asyncio.Queue()
        self._greeting = line(GREETING) if greeting is None else greeting
        self._refusals = list(refusals)
        self._writer: asyncio.StreamWriter | None = None
        self._writers: list[asyncio.StreamWriter] = []

    @classmethod
    @asynccontextmanager
    async def listening(cls, path: str, *, greeting: bytes | None = None, refusals: Sequence[bytes] = ()) -> AsyncIterator[Self]:
        """A peer for the block. `greeting` replaces the proper one, and nothing is negotiated then. The first clients get `refusals`
        for consent, one each."""
        peer = cls(path, greeting, refusals)
        server = await asyncio.start_unix_server(peer._serve, path)
        try:
            yield peer
        finally:
            server.close()
            for writer in peer._writers:
                writer.transport.abort()

    async def send(self, raw: bytes) -> None:
        """Write bytes, waiting until most of them are taken."""
        assert self._writer is not None
        self._writer.write(raw)
        await self._writer.drain()

    async def reply(self, ident: object, value: object = None) -> None:
        """Answer the command of that id."""
        await self.send(line({"return": {} if value is None else value, "id": ident}))

    async def event(self, name: str, **data: object) -> None:
        """Emit an event."""
        await self.send(event(name, **data))

    def hang_up(self) -> None:
        """Drop the connection."""
        assert self._writer is not None
        self._writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._writers.append(writer)
        self.greeted += 1
        writer.write(self._greeting)
        if self._greeting == line(GREETING):
            await self._converse(reader, writer)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = json.JSONDecoder()
        text = ""
        negotiated = False
        while chunk := await reader.read(65536):
            text += chunk.decode()
            while text:
                try:
                    command, end = decoder.raw_decode(text)
                except json.JSONDecodeError:
                    break
                text = text[end:]
                if negotiated:
                    self.received.put_nowait(command)
                else:
                    negotiated = True
                    writer.write(self._refusals.pop(0) if self._refusals else line({"return": {}}))


def line(document: object) -> bytes:
    """The document as one line of QMP."""
    return json.dumps(document).encode() + b"\r\n"


def event(name: str, **data: object) -> bytes:
    """An event as one line of QMP."""
    return line({"event": name, "data": data, "timestamp": {"seconds": 1, "microseconds": 500_000}})
