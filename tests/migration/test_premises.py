"""What a host says it has for a machine that may come: files, room, ports, limits. Nothing is made or touched to find it out."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from qmpd.errors import CannotMove, PeerRefused
from qmpd.migration.bases import Bases
from qmpd.migration.delivery import insisted
from qmpd.migration.diskoffers import mark_of
from qmpd.migration.fingerprints import Fingerprints, loaded_files
from qmpd.migration.likeness import DestinationFacts, HostPort, TargetDisk
from qmpd.migration.premises import Premises
from qmpd.migration.protocol import VERSION, DiskOffer, FileMark, Offer
from qmpd.migrationviews import MigrationFinding
from qmpd.service import Service
from qmpd.settings import Settings
from qmpd.spec import BiosFirmware, BlankDisk, Disk, Forward, ImageDisk, Kernel, Limits, MachineSpec, PflashFirmware, UserNic
from qmpd.tasks import Tasks

MIB = 1024 * 1024
SPEC = MachineSpec(name="web", board="x86_64-q35")
#: No process has it.
ELSEWHERE = "0" * 8 + "-0000-0000-0000-000000000000"


@pytest.fixture
async def premises(service: Service, settings: Settings) -> Premises:
    """Those of a daemon with nothing on it, which may use its own directory only."""
    bounded = replace(settings, pools=(str(Path(settings.state_dir).parent),))
    bases = Bases(Tasks(), bounded.pools, bounded.cache_dir)
    return Premises(bounded, service._registry, service._planning, Fingerprints(bounded.pools), bases)


def offer(spec: MachineSpec, *disks: DiskOffer) -> Offer:
    return Offer(
        protocol=VERSION,
        id="0" * 16,
        epoch=1,
        spec=spec,
        uuid=ELSEWHERE,
        created_at="",
        changed_at="",
        state="running",
        machine="pc-q35-7.2",
        accel="tcg",
        emulator_version="7.2.0",
        disks=disks,
    )


async def disk_of(premises: Premises, disk: Disk, wanted: DiskOffer) -> TargetDisk:
    (found,) = (await premises.of(offer(replace(SPEC, disks=(disk,)), wanted))).disks
    return found


def copied(**fields: object) -> DiskOffer:
    return msgspec.convert({"index": 0, "how": "copy", "virtual_bytes": MIB, **fields}, DiskOffer)


async def test_a_copy_needs_what_the_image_has_of_the_disk(premises: Premises, settings: Settings) -> None:
    path = f"{settings.state_dir}/none/of/these/is/there.raw"
    found = await disk_of(premises, ImageDisk(path=path, format="raw"), copied())
    assert (found.how, found.exists, found.refusal, found.needed_bytes) == ("copy", False, "", MIB)
    assert found.free_bytes is not None
    assert 0 < found.free_bytes <= os.statvfs(settings.state_dir).f_blocks * os.statvfs(settings.state_dir).f_frsize
    assert (await disk_of(premises, ImageDisk(path=path, format="raw"), copied(used_bytes=7))).needed_bytes == 7


async def test_disks_that_go_to_one_file_system_need_their_room_together(premises: Premises, settings: Settings) -> None:
    disks = tuple(ImageDisk(path=f"{settings.state_dir}/{name}", format="raw") for name in "ab")
    facts = await premises.of(offer(replace(SPEC, disks=disks), copied(), copied(index=1, used_bytes=MIB)))
    assert [disk.needed_bytes for disk in facts.disks] == [2 * MIB, 2 * MIB]


async def test_what_is_there_already_is_seen(premises: Premises, settings: Settings) -> None:
    path = Path(settings.state_dir) / "here.img"
    path.write_bytes(b"QFI\xfb" + bytes(508))
    disk = ImageDisk(path=str(path), format="raw")
    mark = mark_of(str(path))
    assert mark is not None
    there = await disk_of(premises, disk, copied(how="auto", mark=msgspec.to_builtins(mark)))
    assert (there.how, there.exists, there.same, there.format) == ("shared", True, True, None)
    grew = await disk_of(premises, disk, copied(how="auto", mark=msgspec.to_builtins(replace(mark, size=mark.size - 1))))
    assert (grew.how, grew.same) == ("shared", True)
    other = await disk_of(premises, disk, copied(mark=msgspec.to_builtins(replace(mark, inode=mark.inode + 1))))
    assert (other.how, other.exists, other.same, other.format) == ("copy", True, False, "qcow2")


@pytest.mark.parametrize(("image_format", "size", "same"), [("raw", 512, None), ("raw", 513, False), ("qcow2", 513, None)])
async def test_files_of_two_hosts_may_be_the_same(
    premises: Premises, settings: Settings, image_format: str, size: int, same: bool | None
) -> None:
    path = Path(settings.state_dir) / "here.img"
    path.write_bytes(bytes(512))
    disk = msgspec.convert({"kind": "image", "path": str(path), "format": image_format}, ImageDisk)
    mark = FileMark(boot_id="another host's", device=1, inode=2, size=size)
    assert (await disk_of(premises, disk, DiskOffer(index=0, how="shared", virtual_bytes=MIB, mark=mark))).same is same


async def test_paths_outside_of_what_the_daemon_may_use_are_refused(premises: Premises) -> None:
    found = await disk_of(premises, ImageDisk(path="/etc/passwd", format="raw"), copied(how="shared"))
    assert (found.exists, "outside" in found.refusal) == (False, True)
    kernel = replace(SPEC, kernel=Kernel(image="/etc/passwd"))
    assert (await premises.of(offer(kernel))).firmware == ()  # nor is anybody told what is in there


async def test_a_disk_of_the_machines_own_goes_to_its_directory(premises: Premises, settings: Settings) -> None:
    found = await disk_of(premises, BlankDisk(size_mib=1), copied(how="auto"))
    assert (found.how, found.exists) == ("copy", False)
    assert found.path == f"{settings.state_dir}/machines/web/disk0.qcow2"


async def test_an_offer_of_a_disk_that_is_not_defined_is_none(premises: Premises) -> None:
    with pytest.raises(CannotMove, match="has only 0"):
        await premises.of(offer(SPEC, copied()))


async def test_ports_that_are_taken_are_found_and_left_alone(premises: Premises) -> None:
    def taken(*ports: HostPort) -> Offer:
        forwards = tuple(Forward(guest_port=1, host_port=port.port, protocol=port.protocol, host_address=port.address) for port in ports)
        return offer(replace(SPEC, nics=(UserNic(forwards=(*forwards, Forward(guest_port=2))),)))

    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as bound:
        bound.bind(("127.0.0.1", 0))
        tcp = HostPort(protocol="tcp", address="127.0.0.1", port=listener.getsockname()[1])
        udp = HostPort(protocol="udp", address="127.0.0.1", port=bound.getsockname()[1])
        foreign = HostPort(protocol="tcp", address="192.0.2.1", port=40000)
        assert (await premises.of(taken(tcp, udp, foreign))).ports_taken == (tcp, udp, foreign)
    assert (await premises.of(taken(tcp, udp))).ports_taken == ()


async def test_a_limit_that_no_host_keeps_is_named(premises: Premises) -> None:
    """The limit is less than the guest's own memory, whatever this host can do."""
    spec = replace(SPEC, memory_mib=64, limits=Limits(memory_max_mib=64))
    facts = await premises.of(offer(spec))
    assert "64 MiB is too little" in facts.limits_unkept["memory_max_mib"]
    assert (await premises.of(offer(SPEC))).limits_unkept == {}
    assert (await premises.of(offer(replace(spec, board="no-such")))).limits_unkept == {}  # whoever starts it says so


async def test_the_host_has_memory(premises: Premises) -> None:
    facts = await premises.of(offer(SPEC))
    assert facts.free_memory_mib is not None
    assert (facts.protocols, facts.free_memory_mib > 0) == ((VERSION,), True)
    assert premises.named(offer(SPEC)) == (False, None)


def test_every_file_that_is_loaded_has_a_role() -> None:
    flash = PflashFirmware(code="/c", vars="/v")
    kernel = Kernel(image="/i", dtb="/d")
    assert loaded_files(replace(SPEC, firmware=flash, kernel=kernel)) == {
        "firmware.code": "/c",
        "firmware.vars": "/v",
        "kernel.image": "/i",
        "kernel.dtb": "/d",
    }
    assert loaded_files(replace(SPEC, firmware=BiosFirmware(path="/b"))) == {"firmware.path": "/b"}
    assert loaded_files(SPEC) == {}


def test_a_file_is_read_again_only_when_it_has_changed(directory: Path) -> None:
    file = directory / "bios"
    prints = Fingerprints((str(directory),))
    spec = replace(SPEC, firmware=BiosFirmware(path=str(file)))
    assert prints.of(spec) == ()
    file.write_bytes(b"one")
    status = file.stat()
    (first,) = prints.of(spec)
    assert (first.role, first.bytes, first.sha256) == ("firmware.path", 3, hashlib.sha256(b"one").hexdigest())
    file.write_bytes(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert prints.of(spec) == (first,)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert prints.of(spec)[0].sha256 == hashlib.sha256(b"two").hexdigest()


async def test_what_a_peer_finds_wrong_with_a_definition_is_told_as_findings() -> None:
    async def refused(code: str, details: object) -> DestinationFacts:
        await asyncio.sleep(0)
        raise PeerRefused("b refused", peer="b", error={"code": code, "message": "no", "details": details})

    problems = {"problems": [{"path": "$.board", "message": "there is no such board"}, "nonsense"]}
    with pytest.raises(CannotMove) as caught:
        await insisted(lambda: refused("invalid", problems))
    (finding,) = msgspec.convert(caught.value.details["findings"], tuple[MigrationFinding, ...])
    assert (finding.severity, finding.code, finding.path) == ("error", "cannot-start", "$.board")
    with pytest.raises(CannotMove) as caught:
        await insisted(lambda: refused("held", {}))
    assert "findings" not in caught.value.details
