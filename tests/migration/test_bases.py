"""Disks upon a base that the destination has as well: only what lies above it is sent, and the guest has every byte that it had."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from qmpd.errors import CannotMove, Invalid
from qmpd.lifecycle import State
from qmpd.migration import delivery
from qmpd.migration.bases import Bases
from qmpd.migration.consignment import check_bases
from qmpd.migration.likeness import BaseThere, SourceDisk, TargetDisk
from qmpd.migration.protocol import BaseOffer, DiskOffer
from qmpd.migrationviews import MigrateRequest
from qmpd.spec import BaseImage, DiskFormat, ImageDisk
from qmpd.views import StartRequest
from tests.api.lab import Daemon
from tests.guests.build import Guest
from tests.guests.ring import missing, read_ring
from tests.migration.overlays import CHANGES, MIB, RING, base_of, below, content, overlaid, qemu_img, qemu_io
from tests.migration.test_comparison import ARRIVAL, AT_REST, DEPARTURE, SHARED, codes
from tests.migration.test_copying_live import copied, in_order, left
from tests.migration.test_disk_moves import moved as moved_disk
from tests.migration.test_dry_runs import tried
from tests.migration.test_moves import HUNG_S, LOOK_S, ended, moved, pair
from tests.migration.test_moving_disks import written

pytestmark = pytest.mark.qemu


async def check(there: Daemon, image: Path, directory: Path, base: bytes, last: int) -> None:
    """No block that was acknowledged is lost, and everything that the guest does not write to is what it was."""
    await there.service.stop("web")
    found = await content(image, directory)
    ring = read_ring(directory / "flat.raw")
    assert ring.newest >= last
    assert (ring.torn, missing(ring, last)) == ((), ())
    assert len(found) == len(base)
    assert (found[: RING.start], found[RING.stop :]) == (base[: RING.start], base[RING.stop :])


async def test_a_disk_that_moves_on_its_host_stays_upon_its_base_or_gets_all_of_it(short_directory: Path, guests: dict[str, Guest]) -> None:
    spec = await overlaid(short_directory, guests["x86_64-pc-blocks"])
    raw = base_of(spec).read_bytes()
    async with pair(short_directory) as (a, _):
        await a.service.create(spec, start=True)
        await written(a, "web", 10)
        await moved_disk(a, "web", short_directory / "upon.qcow2", format="qcow2")
        await written(a, "web", 10)
        assert (short_directory / "upon.qcow2").stat().st_blocks * 512 < 4 * MIB
        assert base_of(a.service.definition("web").spec) == base_of(spec)
        await a.service.stop("web")
        assert await below(short_directory / "upon.qcow2") == str(base_of(spec))
        await a.service.start("web", StartRequest())
        last = await written(a, "web", 10)
        await check(a, short_directory / "upon.qcow2", short_directory, raw, last)
        await a.service.start("web", StartRequest())
        await moved_disk(a, "web", short_directory / "whole.raw", format="raw")
        last = await written(a, "web", 10)
        await a.service.stop("web")
    found, ring = (short_directory / "whole.raw").read_bytes(), read_ring(short_directory / "whole.raw")
    assert (ring.newest >= last, missing(ring, last)) == (True, ())
    assert (found[: RING.start], found[RING.stop :]) == (raw[: RING.start], raw[RING.stop :])


@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
async def test_only_what_lies_upon_a_base_is_sent(short_directory: Path, guests: dict[str, Guest], base_format: DiskFormat) -> None:
    spec = await overlaid(short_directory, guests["x86_64-pc-blocks"], base_format)
    there = short_directory / "elsewhere" / "golden"
    there.parent.mkdir()
    there.write_bytes(base_of(spec).read_bytes())
    raw = await raw_of(base_of(spec), short_directory)
    choice = {"disk": 0, "how": "copy", "path": str(short_directory / "there.qcow2"), "base": str(there)}
    async with pair(short_directory) as (a, b):
        await a.service.create(spec, start=True)
        await written(a, "web", 30)
        dry = await tried(a, "web", disks=[choice])
        assert dry.possible
        assert [finding.severity for finding in dry.findings if finding.code == "base-same"] == ["info"]
        assert dry.prediction is not None
        assert dry.prediction.disk_bytes < 2 * MIB
        (disk,) = (await moved(a, "web", "b", disks=[choice])).disks
        assert disk.base == str(there)
        assert disk.bytes > 0  # however often the guest wrote to the same places meanwhile
        assert (short_directory / "there.qcow2").stat().st_blocks * 512 < 4 * MIB
        last = await written(b, "web", 30)
        (here,) = b.service.definition("web").spec.disks
        assert isinstance(here, ImageDisk)
        assert (here.path, here.base) == (choice["path"], BaseImage(path=str(there), format=base_format))
        await check(b, Path(here.path), short_directory, raw, last)
        assert await below(Path(here.path)) == str(there)
        # And it is a machine like any other: it starts, and goes back to where its base is another path.
        await b.service.start("web", StartRequest())
        await written(b, "web", 5)
        back = {"disk": 0, "how": "copy", "path": str(short_directory / "back.qcow2"), "base": str(base_of(spec))}
        (disk,) = (await moved(b, "web", "a", disks=[back])).disks
        assert disk.base == str(base_of(spec))
        last = await written(a, "web", 5)
        await check(a, short_directory / "back.qcow2", short_directory, raw, last)
    assert there.read_bytes() == base_of(spec).read_bytes()


async def raw_of(base: Path, directory: Path) -> bytes:
    await qemu_img("convert", "-O", "raw", str(base), str(directory / "base.flat"))
    return (directory / "base.flat").read_bytes()


async def test_a_base_that_is_not_the_same_is_sent_with_the_rest(short_directory: Path, guests: dict[str, Guest]) -> None:
    spec = await overlaid(short_directory, guests["x86_64-pc-blocks"])
    raw = base_of(spec).read_bytes()
    there, image = short_directory / "golden.raw", short_directory / "there.qcow2"
    there.write_bytes(raw)
    choice = {"disk": 0, "how": "copy", "path": str(image), "base": str(there)}
    async with pair(short_directory) as (a, b):
        await a.service.create(spec, start=True)
        await written(a, "web", 30)
        assert "base-same" in {finding.code for finding in (await tried(a, "web", disks=[choice])).findings}
        with there.open("r+b") as file:  # between the dry run and the migration
            file.seek(20 * MIB)
            file.write(b"somebody was here")
        dry = await tried(a, "web", disks=[choice])
        (finding,) = [finding for finding in dry.findings if finding.code == "base-differs"]
        assert (finding.severity, finding.path) == ("warning", "$.disks[0]")
        assert "other contents" in finding.message
        assert "base=PATH" in finding.mend
        assert dry.prediction is not None
        assert dry.prediction.disk_bytes > 20 * MIB
        gone = [finding for finding in (await tried(a, "web", disks=[choice | {"base": "/nowhere/x"}])).findings if "base" in finding.code]
        assert [(finding.code, "no such file" in finding.message) for finding in gone] == [("base-differs", True)]
        (disk,) = (await moved(a, "web", "b", disks=[choice])).disks
        assert disk.base is None
        assert disk.bytes > 20 * MIB
        last = await written(b, "web", 30)
        (here,) = b.service.definition("web").spec.disks
        assert isinstance(here, ImageDisk)
        assert here.base is None
        await check(b, image, short_directory, raw, last)
        assert await below(image) is None


async def test_a_machine_at_rest_keeps_its_base(short_directory: Path, guests: dict[str, Guest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "OFFER_DEADLINE_S", 0.0)
    spec = await overlaid(short_directory, guests["x86_64-pc-blocks"])
    raw = base_of(spec).read_bytes()
    image = short_directory / "there.qcow2"
    choice = {"disk": 0, "how": "copy", "path": str(image)}
    async with pair(short_directory) as (a, b):
        await a.service.create(spec, start=True)
        await written(a, "web", 10)
        await a.service.stop("web")
        before = await content(short_directory / "web.qcow2", short_directory)
        other = msgspec.convert({"peer": "b", "disks": [choice | {"base": "/srv/x"}]}, MigrateRequest)
        refused = await ended(a, await a.service.migration.migrate("web", other))
        assert "is sent as it is" in str(refused.error)
        assert "base-same" in {finding.code for finding in (await tried(a, "web", disks=[choice])).findings}
        (disk,) = (await moved(a, "web", "b", disks=[choice])).disks
        assert (disk.base, disk.bytes < 4 * MIB) == (str(base_of(spec)), True)
        assert await content(image, short_directory) == before
        assert (await b.service.start("web", StartRequest())).state is State.RUNNING
        last = await written(b, "web", 5)
        await check(b, image, short_directory, raw, last)


async def test_a_shared_disk_keeps_its_base_where_it_is(short_directory: Path, guests: dict[str, Guest]) -> None:
    spec = await overlaid(short_directory, guests["x86_64-pc-blocks"], "qcow2")
    raw = await raw_of(base_of(spec), short_directory)
    async with pair(short_directory) as (a, b):
        await a.service.create(spec, start=True)
        await written(a, "web", 10)
        assert (await tried(a, "web")).possible
        (disk,) = (await moved(a, "web", "b")).disks
        assert (disk.how, disk.base) == ("shared", None)
        last = await written(b, "web", 10)
        await check(b, short_directory / "web.qcow2", short_directory, raw, last)


async def test_a_base_that_no_definition_names_is_refused_and_so_is_another_one(short_directory: Path, guests: dict[str, Guest]) -> None:
    spec = await overlaid(short_directory, guests["x86_64-pc-blocks"])
    (disk,) = spec.disks
    assert isinstance(disk, ImageDisk)
    other = short_directory / "other.raw"
    other.write_bytes(base_of(spec).read_bytes())
    wrong = {
        "refers to a backing file": msgspec.structs.replace(disk, base=None),
        "was made upon": msgspec.structs.replace(disk, base=BaseImage(path=str(other), format="raw")),
        "not a qcow2 image": msgspec.structs.replace(disk, base=BaseImage(path=str(base_of(spec)), format="qcow2")),
        "made upon nothing": msgspec.structs.replace(disk, path=str(short_directory / "plain.qcow2")),
        "no such file": msgspec.structs.replace(disk, base=BaseImage(path="/nowhere/base", format="raw")),
        "lies upon": msgspec.structs.replace(disk, base=BaseImage(path=disk.path, format="qcow2")),
    }
    await qemu_img("create", "-q", "-f", "qcow2", str(short_directory / "plain.qcow2"), "8M")
    async with pair(short_directory) as (a, _):
        for words, changed in wrong.items():
            with pytest.raises(Invalid) as error:
                await a.service.create(msgspec.structs.replace(spec, disks=(changed,)))
            assert words in str(error.value), words


async def test_an_image_that_would_lose_its_base_on_the_way_is_told(short_directory: Path, guests: dict[str, Guest]) -> None:
    spec = await overlaid(short_directory, guests["x86_64-pc-blocks"])
    beside, elsewhere = str(short_directory / "new.qcow2"), str(short_directory / "x" / "new.qcow2")
    wanted = [DiskOffer(index=0, how="copy", virtual_bytes=0, path=path) for path in (beside, elsewhere)]
    check_bases(spec, wanted)
    await qemu_img("rebase", "-u", "-f", "qcow2", "-b", "base.raw", "-F", "raw", str(short_directory / "web.qcow2"))
    check_bases(spec, wanted[:1])
    with pytest.raises(CannotMove, match="rebase"):
        check_bases(spec, wanted)


def test_of_a_machine_at_rest_the_base_must_be_there() -> None:
    disk = SourceDisk(index=0, how="copy", format="qcow2", bytes=MIB)
    there = TargetDisk(index=0, path="/pool/web.qcow2", exists=False, base=BaseThere(path="/b", same=False, why="there is none"))
    resting, running = (msgspec.structs.replace(facts, disks=(disk,)) for facts in (AT_REST, DEPARTURE))
    arrival = msgspec.structs.replace(ARRIVAL, disks=(there,))
    assert codes(resting, arrival) == [("error", "base-differs")]
    assert codes(running, arrival) == [("warning", "base-differs")]
    same = msgspec.structs.replace(there, base=BaseThere(path="/b", same=True))
    assert codes(resting, msgspec.structs.replace(ARRIVAL, disks=(same,))) == [("info", "base-same")]


def test_a_shared_disk_must_have_the_same_base_on_both_hosts() -> None:
    for same, findings in ((True, []), (False, [("error", "base-differs")])):
        shared = msgspec.structs.replace(SHARED, base=BaseThere(path="/b", same=same))
        assert codes(DEPARTURE, msgspec.structs.replace(ARRIVAL, disks=(shared,))) == findings


@pytest.mark.parametrize(("runs", "when"), [(True, 1), (True, 2), (False, 1)])
async def test_a_base_that_changes_meanwhile_leaves_the_machine_where_it_is(
    short_directory: Path, guests: dict[str, Guest], monkeypatch: pytest.MonkeyPatch, runs: bool, when: int
) -> None:
    """When its QEMU has just opened it, or at the very end."""
    monkeypatch.setattr(delivery, "OFFER_DEADLINE_S", 0.0)
    spec = await overlaid(short_directory, guests["x86_64-pc-blocks"])
    base, image = base_of(spec), short_directory / "there.qcow2"
    if runs:
        base = short_directory / "golden.raw"
        base.write_bytes(base_of(spec).read_bytes())
    look, looks = Bases.check, 0

    async def changed(ours: Bases, wanted: Sequence[BaseOffer]) -> None:
        nonlocal looks
        looks += 1
        assert [offered.path for offered in wanted] == [str(base)]
        if looks == when:
            with base.open("r+b") as file:
                file.write(base.read_bytes()[:16])
        await look(ours, wanted)

    monkeypatch.setattr(Bases, "check", changed)
    choice = {"disk": 0, "how": "copy", "path": str(image), **({"base": str(base)} if runs else {})}
    async with pair(short_directory) as (a, b):
        await a.service.create(spec, start=True)
        await written(a, "web", 10)
        if not runs:
            await a.service.stop("web")
        job = await ended(a, await a.service.migration.migrate("web", msgspec.convert({"peer": "b", "disks": [choice]}, MigrateRequest)))
        assert "was changed since" in str(job.error)
        assert looks == when
        assert a.service.machine("web").state is (State.RUNNING if runs else State.STOPPED)
        async with asyncio.timeout(HUNG_S):
            while b.service.machines({}, None).machines:
                await asyncio.sleep(LOOK_S)
        assert not image.exists()
        if runs:
            await written(a, "web", 5)


@pytest.mark.parametrize("runs", [True, False])
async def test_a_copy_lies_upon_the_same_base(short_directory: Path, guests: dict[str, Guest], runs: bool) -> None:
    spec = await overlaid(short_directory, guests["x86_64-pc-blocks"])
    raw = base_of(spec).read_bytes()
    image = short_directory / "second.qcow2"
    async with pair(short_directory) as (a, b):
        await a.service.create(spec, start=True)
        last = await written(a, "web", 20)
        if not runs:
            await a.service.stop("web")
        choice = {"disk": 0, "how": "copy", "path": str(image)}
        report = await copied(a, "web", copy={"name": "second"}, disks=[choice])
        assert report.disks[0].bytes < 4 * MIB
        assert left(short_directory) == []
        assert await below(image) == str(base_of(spec))
        found = await content(image, short_directory)
        in_order(short_directory / "flat.raw", last)
        assert (found[: RING.start], found[RING.stop :]) == (raw[: RING.start], raw[RING.stop :])
        assert (await b.service.start("second", StartRequest())).state is State.RUNNING
        await written(b, "second", 5)
        await b.service.kill("second")


async def test_what_a_guest_has_zeroed_or_freed_does_not_come_back_from_the_base(short_directory: Path, guests: dict[str, Guest]) -> None:
    spec = await overlaid(short_directory, guests["x86_64-pc-blocks"])
    web, image = short_directory / "web.qcow2", short_directory / "there.qcow2"
    await qemu_io(web, *CHANGES)
    before = await content(web, short_directory)
    assert before != base_of(spec).read_bytes()
    assert not any(before[10 * MIB : 11 * MIB])
    async with pair(short_directory) as (a, b):
        await a.service.create(spec, start=True)
        await written(a, "web", 10)
        (disk,) = (await moved(a, "web", "b", disks=[{"disk": 0, "how": "copy", "path": str(image)}])).disks
        assert disk.base == str(base_of(spec))
        last = await written(b, "web", 10)
        await check(b, image, short_directory, before, last)
