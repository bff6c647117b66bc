"""What belongs to a machine is handed in by one daemon at another over TLS, by whom it may, and as it was announced."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from qmpd import segments
from qmpd.access import Caller
from qmpd.audit import Sought
from qmpd.errors import (
    AlreadyExists,
    Forbidden,
    HostError,
    Invalid,
    MigrationFailed,
    NoSpace,
    NotFound,
    PeerRefused,
    PeerSilent,
    PeerUnavailable,
    WrongState,
)
from qmpd.facts import MachinePaths
from qmpd.migration import fileitems, itemdesk
from qmpd.migration.extents import BLOCK, allocated, fingerprint
from qmpd.migration.fileitems import FileSender, ItemLink, VariablesSender
from qmpd.migration.itemdesk import Delivery, ItemDesk
from qmpd.migration.parcels import ItemStanding, Parcel
from qmpd.spec import BlankDisk, ImageDisk, MachineSpec, PflashFirmware
from qmpd.tasks import Tasks, background
from qmpd_api.dialling import PeerClient, dialled
from tests.api.lab import Daemon, authority, daemon, host, peer, port
from tests.migration.test_items import holed

CAP = 1 << 20
MIGRATION = "0123456789abcdef"


class Rooms:
    """What comes to `b`, and what `b` lets whom hand in."""

    def __init__(self, directory: Path, tasks: Tasks) -> None:
        (directory / "own").mkdir()
        (directory / "pool").mkdir()
        self.pools = [str(directory / "pool")]
        self.own = directory / "own"
        self.image = directory / "pool" / "there.img"
        self.delivery = Delivery(
            migration=MIGRATION,
            spec=MachineSpec(
                name="one",
                board="x86_64-q35",
                firmware=PflashFirmware(code="/c", vars="/v"),
                disks=(BlankDisk(size_mib=1024), ImageDisk(path=str(self.image), format="raw")),
            ),
            paths=MachinePaths(run=str(directory / "run"), state=str(self.own)),
            parcels=(),
            log_cap_bytes=CAP,
            serial_ports=(0,),
        )
        self.over = False
        self._tasks = tasks
        self.desk = ItemDesk(tasks, self.admitted)

    def announce(self, *parcels: Parcel, **changes: object) -> None:
        self.delivery = msgspec.structs.replace(self.delivery, parcels=parcels, **changes)

    def restarted(self) -> ItemDesk:
        """As after a restart of the daemon."""
        self.desk = ItemDesk(self._tasks, self.admitted)
        return self.desk

    def admitted(self, caller: Caller, migration: str) -> Delivery:
        if caller.peer != "a" or migration != self.delivery.migration:
            raise NotFound(f"there is no migration {migration!r}")
        if self.over:
            raise WrongState("it is over", state="arrived", allowed=["awaiting"])
        return self.delivery


class Pair:
    """Two daemons that know each other, and a third that `b` knows too."""

    def __init__(self, b: Daemon, link: PeerClient, third: PeerClient, rooms: Rooms) -> None:
        self.b = b
        self.link = link
        self.third = third
        self.rooms = rooms
        b.service.items = rooms.desk


@pytest.fixture
async def pair(short_directory: Path) -> AsyncIterator[Pair]:
    made = await asyncio.to_thread(authority, short_directory / "ca")
    async with AsyncExitStack() as stack:
        listener, number = stack.enter_context(port())
        pki = {name: await asyncio.to_thread(host, made, short_directory / f"{name}-pki", name) for name in ("a", "b", "c")}
        known = [peer("a", 1), peer("c", 1)]
        b = await stack.enter_async_context(daemon("b", short_directory / "b", pki["b"], listener, known))
        a, c = [await stack.enter_async_context(dialled(peer("b", number), str(pki[name].directory))) for name in ("a", "c")]
        yield Pair(b, a, c, Rooms(short_directory, await stack.enter_async_context(background())))


@pytest.fixture
async def rooms(tmp_path: Path) -> AsyncIterator[Rooms]:
    async with background() as tasks:
        yield Rooms(tmp_path, tasks)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is so at once."""
    monkeypatch.setattr(fileitems, "AGAIN_S", 0.01)


class Flaky:
    """A link whose answers get lost, before or after the question was heard; now and then the other daemon was restarted meanwhile."""

    def __init__(self, link: ItemLink, pair: Pair, seed: int) -> None:
        self._link = link
        self._pair = pair
        self._chance = random.Random(seed)
        self.lost = 0

    async def put_item(self, migration: str, item: str, offset: int, data: bytes) -> ItemStanding:
        self._lose(PeerUnavailable("before"), 0.15)
        answer = await self._link.put_item(migration, item, offset, data)
        self._lose(PeerSilent("after"), 0.15)
        return answer

    async def item(self, migration: str, item: str) -> ItemStanding:
        self._lose(PeerSilent("before"), 0.15)
        return await self._link.item(migration, item)

    def _lose(self, error: Exception, chance: float) -> None:
        if self._chance.random() < chance:
            self.lost += 1
            self._pair.b.service.items = self._pair.rooms.restarted()
            raise error


def as_peer(name: str = "a") -> Caller:
    return Caller(role="peer", peer=name)


async def test_a_file_arrives_as_it_was_however_often_an_answer_is_lost(pair: Pair, short_directory: Path, hurried: None) -> None:
    del hurried
    source = short_directory / "source"
    data = await asyncio.to_thread(holed, source, 3)
    pair.rooms.announce(Parcel(item="disk-1", size=len(data), allocated=allocated(str(source))))
    await pair.rooms.desk.prepare(pair.rooms.delivery, pair.rooms.pools)
    told: list[int] = []
    link = Flaky(pair.link, pair, 7)
    await FileSender(link, MIGRATION, "disk-1", str(source)).send(lambda done, of: told.append(done) if of == len(data) else None)
    assert link.lost >= 3
    assert told[-1] == len(data)
    assert not pair.rooms.image.exists()
    await pair.rooms.desk.place(pair.rooms.delivery)
    assert pair.rooms.image.read_bytes() == data
    assert allocated(str(pair.rooms.image)) < len(data)
    assert [entry.name for entry in pair.rooms.image.parent.iterdir()] == ["there.img"]


async def test_all_files_of_a_machine_at_rest_arrive(pair: Pair, short_directory: Path) -> None:
    contents = {"disk-0": b"disk" * 1000, "vars": os.urandom(BLOCK + 5), "stderr": b"", "exit": b"ended"}
    there = {"disk-0": "disk0.qcow2", "vars": "firmware-vars.fd", "stderr": "stderr.log", "exit": "last-exit.msgpack"}
    parcels = [Parcel(item=item, size=len(data)) for item, data in contents.items()]
    pair.rooms.announce(*parcels, Parcel(item="log-0", size=1006))
    await pair.rooms.desk.prepare(pair.rooms.delivery, pair.rooms.pools)
    for item, data in contents.items():
        (short_directory / item).write_bytes(data)
        await FileSender(pair.link, MIGRATION, item, str(short_directory / item)).send()
    received = [
        (await pair.link.put_item(MIGRATION, "log-0", offset, text)).received
        for offset, text in ((0, b"begin"), (1000, b"the en"), (1000, b"the en"))
    ]
    assert received == [5, 1006, 1006]
    assert (await pair.link.item(MIGRATION, "log-0")).received == 1006
    assert {entry.name for entry in pair.rooms.own.iterdir()}.isdisjoint(there.values())
    await pair.rooms.desk.place(pair.rooms.delivery)
    assert {item: (pair.rooms.own / name).read_bytes() for item, name in there.items()} == contents
    stem = str(pair.rooms.own / "serial0.log")
    assert segments.read(stem, 0, 100) == (0, b"begin")
    assert segments.read(stem, 5, 100) == (1000, b"the en")


async def test_what_is_said_to_be_whole_outlives_a_crash_of_the_host(rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms.announce(Parcel(item="disk-1", size=3), Parcel(item="exit", size=2), Parcel(item="log-0", size=9))
    forced: set[str] = set()
    real = os.fsync

    def seen(descriptor: int) -> None:
        forced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    await rooms.desk.put(as_peer(), MIGRATION, "disk-1", 0, b"abc")
    assert not await rooms.desk.whole(rooms.delivery)
    await rooms.desk.put(as_peer(), MIGRATION, "exit", 0, b"ok")
    assert forced == set()
    await rooms.desk.item(as_peer(), MIGRATION, "disk-1")  # with its digest
    arriving = f"{rooms.image.parent}/.there.img.{MIGRATION}.arriving"
    assert forced == {arriving}
    assert await rooms.desk.whole(rooms.delivery)
    assert forced == {arriving, str(rooms.image.parent), f"{rooms.own}/.last-exit.msgpack.{MIGRATION}.arriving", str(rooms.own)}


async def test_a_log_that_is_settled_takes_what_is_missing_of_it(rooms: Rooms) -> None:
    rooms.announce(Parcel(item="log-0", size=0), live=True)
    assert (await rooms.desk.put(as_peer(), MIGRATION, "log-0", 0, b"first")).received == 5
    stem = str(rooms.own / "serial0.log")
    assert segments.pieces(stem) == []
    rooms.announce(Parcel(item="log-0", size=0), live=True, log_ends={0: 8})
    assert (await rooms.desk.put(as_peer(), MIGRATION, "log-0", 5, b"r")).received == 6
    rooms.announce(Parcel(item="log-0", size=0), Parcel(item="disk-0", size=5), live=True, log_ends={0: 8}, arrived=True)
    with pytest.raises(WrongState, match="its files are its own"):
        await rooms.desk.put(as_peer(), MIGRATION, "disk-0", 0, b"12345")
    assert (await rooms.desk.put(as_peer(), MIGRATION, "log-0", 6, b"est and more")).received == 8
    rooms.announce(Parcel(item="log-0", size=0), live=True, log_ends={0: 8}, arrived=True)
    await rooms.desk.place(rooms.delivery)
    assert segments.read(stem, 5, 100) == (5, b"res")


async def test_variables_are_sent_again_where_they_changed(rooms: Rooms, tmp_path: Path) -> None:
    size = 3 * BLOCK + 100
    source = tmp_path / "vars"
    source.write_bytes(os.urandom(size))
    rooms.announce(Parcel(item="vars", size=size), live=True)
    await rooms.desk.prepare(rooms.delivery, rooms.pools)
    there = rooms.own / "firmware-vars.fd"
    assert there.read_bytes() == bytes(size)

    class Direct:
        async def put_item(self, migration: str, item: str, offset: int, data: bytes) -> ItemStanding:
            return await rooms.desk.put(as_peer(), migration, item, offset, data)

        async def item(self, migration: str, item: str) -> ItemStanding:
            return await rooms.desk.item(as_peer(), migration, item)

    sender = VariablesSender(Direct(), MIGRATION, str(source))
    assert await sender.send() == 4
    assert there.read_bytes() == source.read_bytes()
    digest = (await rooms.desk.item(as_peer(), MIGRATION, "vars")).digest
    assert digest == await fingerprint(str(source))
    for changed in (b"changed", bytes(200)):
        with source.open("r+b") as file:
            file.seek(BLOCK + 10)
            file.write(changed)
        assert await sender.send() == 1
        assert there.read_bytes() == source.read_bytes()
    assert await sender.send() == 0
    os.utime(source, ns=(1, 1))  # long ago
    assert (await sender.send(), await sender.send()) == (0, 0)
    assert (await rooms.desk.item(as_peer(), MIGRATION, "vars")).digest == await fingerprint(str(source)) != digest
    await rooms.desk.place(rooms.delivery)


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
async def test_only_the_peer_of_the_migration_hands_in_what_it_announced(pair: Pair) -> None:
    pair.rooms.announce(Parcel(item="disk-0", size=10))
    put = pair.link.put_item
    for refused in (
        pair.third.put_item(MIGRATION, "disk-0", 0, b"x"),
        pair.third.item(MIGRATION, "disk-0"),
        put("another", "disk-0", 0, b"x"),
        put(MIGRATION, "disk-1", 0, b"x"),
        put(MIGRATION, "disk-00", 0, b"x"),
        put(MIGRATION, "disk-0/../../../x", 0, b"x"),
        put(MIGRATION, "..%2fx", 0, b"x"),
        pair.link.item(MIGRATION, "passwd"),
    ):
        with pytest.raises(PeerRefused) as caught:
            await refused
        assert _code(caught.value) == "not_found"
    assert list(pair.rooms.own.iterdir()) == []
    assert (await put(MIGRATION, "disk-0", 0, b"0123456789")).received == 10
    for offset, data, code in (
        (0, bytes(11), "invalid"),
        (2**62, b"x", "invalid"),
        (-1, b"x", "invalid"),
        (0, bytes(BLOCK + 1), "too_large"),
    ):
        with pytest.raises(PeerRefused) as caught:
            await put(MIGRATION, "disk-0", offset, data)
        assert _code(caught.value) == code
    noted = (await pair.b.service.audit.read(Sought())).entries
    assert {entry.status for entry in noted} == {404, 422}  # a disk would fill the log with what was taken
    pair.rooms.over = True
    with pytest.raises(PeerRefused) as caught:
        await put(MIGRATION, "disk-0", 0, b"0123456789")
    assert _code(caught.value) == "wrong_state"


def _code(error: PeerRefused) -> str:
    said = error.details["error"]
    assert isinstance(said, dict)
    return str(said["code"])


async def test_what_does_not_fit_is_refused_before_anything_is_sent(rooms: Rooms, tmp_path: Path) -> None:
    disk = Parcel(item="disk-1", size=10)
    rooms.announce(disk, Parcel(item="disk-7", size=1))
    with pytest.raises(Invalid, match="no disk-7"):
        await rooms.desk.prepare(rooms.delivery, rooms.pools)
    rooms.announce(disk)
    with pytest.raises(Forbidden, match="outside the directories"):
        await rooms.desk.prepare(rooms.delivery, [str(tmp_path / "own")])
    rooms.image.write_bytes(b"somebody's")
    with pytest.raises(AlreadyExists, match="name another path"):
        await rooms.desk.prepare(rooms.delivery, rooms.pools)
    rooms.image.unlink()
    rooms.image.parent.rmdir()
    with pytest.raises(NotFound, match="no directory"):
        await rooms.desk.prepare(rooms.delivery, rooms.pools)
    rooms.image.parent.mkdir()
    rooms.announce(Parcel(item="disk-1", size=2**50, allocated=2**50))
    with pytest.raises(NoSpace, match="are free"):
        await rooms.desk.prepare(rooms.delivery, rooms.pools)
    rooms.announce(Parcel(item="disk-1", size=2**43), Parcel(item="disk-0", size=2**43))
    await rooms.desk.prepare(rooms.delivery, rooms.pools)
    assert list(rooms.own.iterdir()) == []


async def test_what_came_otherwise_than_it_was_sent_is_found(rooms: Rooms, tmp_path: Path, hurried: None) -> None:
    del hurried
    source = tmp_path / "source"
    source.write_bytes(b"0123456789" * 1000)
    rooms.announce(Parcel(item="disk-0", size=10_000))

    class Spoiling:
        async def put_item(self, migration: str, item: str, offset: int, data: bytes) -> ItemStanding:
            return await rooms.desk.put(as_peer(), migration, item, offset, data.replace(b"5", b"6", 1))

        async def item(self, migration: str, item: str) -> ItemStanding:
            return await rooms.desk.item(as_peer(), migration, item)

    with pytest.raises(MigrationFailed, match="arrived as another"):
        await FileSender(Spoiling(), MIGRATION, "disk-0", str(source)).send()
    source.write_bytes(b"shorter")
    with pytest.raises(MigrationFailed, match="announced with 10000"):
        await FileSender(Spoiling(), MIGRATION, "disk-0", str(source)).send()
    await rooms.desk.discard(rooms.delivery)
    await rooms.desk.discard(rooms.delivery)
    assert list(rooms.own.iterdir()) == []


async def test_a_peer_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fileitems, "AGAIN_S", 0.0)
    (tmp_path / "source").write_bytes(b"x")

    class Deaf:
        asked = 0

        async def put_item(self, migration: str, item: str, offset: int, data: bytes) -> ItemStanding:
            raise PeerSilent(f"{migration} {item} {offset} {data!r}")

        async def item(self, migration: str, item: str) -> ItemStanding:
            self.asked += 1
            return ItemStanding(item=f"{migration}{item}", received=0, size=1)

    link = Deaf()
    with pytest.raises(PeerSilent):
        await FileSender(link, MIGRATION, "disk-0", str(tmp_path / "source")).send()
    assert link.asked == fileitems.ATTEMPTS


async def test_a_digest_that_takes_long_is_not_waited_for_and_one_that_fails_is_said(rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms.announce(Parcel(item="disk-0", size=3))
    gate, asked = asyncio.Event(), []

    async def slowly(path: str) -> str:
        asked.append(path)
        await gate.wait()
        return "digest"

    monkeypatch.setattr(itemdesk, "fingerprint", slowly)
    monkeypatch.setattr(itemdesk, "DIGEST_WAIT_S", 0.01)
    await rooms.desk.put(as_peer(), MIGRATION, "disk-0", 0, b"abc")
    assert [(await rooms.desk.item(as_peer(), MIGRATION, "disk-0")).digest for _ in range(2)] == [None, None]
    gate.set()
    monkeypatch.setattr(itemdesk, "DIGEST_WAIT_S", fileitems.DIGEST_LIMIT_S)  # a busy disk takes its time before
    assert (await rooms.desk.item(as_peer(), MIGRATION, "disk-0")).digest == "digest"
    assert len(asked) == 1

    async def broken(path: str) -> str:
        raise OSError(5, "Input/output error", path)

    monkeypatch.setattr(itemdesk, "fingerprint", broken)
    desk = rooms.restarted()
    for _ in range(2):
        with pytest.raises(HostError, match="cannot be read again"):
            await desk.item(as_peer(), MIGRATION, "disk-0")
