"""What paths lead to, and the images and copies a machine gets."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path

import msgspec
import pytest

from qmpd.errors import AlreadyExists, HostError, NoSpace
from qmpd.facts import FileFacts
from qmpd.plan import BlankImage, Copy
from qmpd.runlock import LOCK_NAME
from qmpd.spec import BaseImage, MachineSpec
from qmpd.storage import examine, guest_bytes, make, make_place, mark_finished, paths_of, remove_machine_files, replace
from tests.process.emulator import names
from tests.unit.toy import spec_of

MIB = 1024 * 1024

EVERYWHERE = ("/",)


def facts_of(path: Path | str, pools: tuple[str, ...] = EVERYWHERE) -> FileFacts:
    return examine([str(path)], pools)[str(path)]


def qcow2(version: int = 3, *, backing: int = 0, encrypted: int = 0, features: int = 0, length: int = 104) -> bytes:
    """The header of an image (docs/interop/qcow2.txt), cut off at `length`."""
    header = bytearray(104)
    header[:8] = b"QFI\xfb" + version.to_bytes(4, "big")
    struct.pack_into(">Q", header, 8, backing)
    struct.pack_into(">I", header, 32, encrypted)
    struct.pack_into(">Q", header, 72, features)
    return bytes(header[:length])


def test_every_path_of_a_definition_is_looked_at_once() -> None:
    image = {"kind": "image", "path": "/d", "format": "raw"}
    spec = spec_of(
        {
            "disks": [image, {"kind": "blank", "size_mib": 1}, image],
            "kernel": {"image": "/k", "initrd": "/i", "dtb": "/d"},
            "firmware": {"kind": "pflash", "code": "/c", "vars": "/v"},
        }
    )
    assert paths_of(spec) == ("/d", "/k", "/i", "/c", "/v")
    assert paths_of(spec_of({"firmware": {"kind": "bios", "path": "/b"}, "kernel": {"image": "/k"}})) == ("/k", "/b")
    assert paths_of(MachineSpec(name="one", board="toy")) == ()


def test_a_file_is_what_its_header_says(tmp_path: Path) -> None:
    headers = {"raw": b"\0" * 512, "qcow2": qcow2(), "elf": b"\x7fELF\2", "vmdk": b"KDMV", "empty": b"", "vpc": b"conectix"}
    for name, header in headers.items():
        (tmp_path / name).write_bytes(header)
        found = facts_of(tmp_path / name)
        assert (found.kind, found.size, found.readable, found.writable) == ("file", len(header), True, True)
        assert found.magic == (None if name in {"raw", "empty"} else name)
        assert found.refusal is None


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (qcow2(backing=512), "refers to a backing file"),
        (qcow2(2, backing=512, length=72), "refers to a backing file"),
        (qcow2(encrypted=1), "is encrypted"),
        (qcow2(features=1 << 2), "keeps its data in another file"),
        (qcow2(features=1 << 1), "is marked corrupt"),
        (qcow2(2, features=1 << 2), None),
        (qcow2(features=1), None),
    ],
)
def test_an_image_that_needs_anything_but_itself_is_refused(tmp_path: Path, header: bytes, reason: str | None) -> None:
    (tmp_path / "image").write_bytes(header)
    refusal = facts_of(tmp_path / "image").refusal
    assert refusal is None if reason is None else reason in (refusal or "")


@pytest.mark.parametrize(
    ("name", "leads_to"),
    [("base.raw", "base.raw"), ("../x/base", "../x/base"), ("json:{}", None), ("nbd://h/x", None), ("file:/etc/passwd", None), ("", None)],
)
def test_what_an_image_was_made_upon_is_told_where_it_is_a_file(tmp_path: Path, name: str, leads_to: str | None) -> None:
    header = bytearray(qcow2(backing=104))
    struct.pack_into(">I", header, 16, len(name))
    (tmp_path / "image").write_bytes(bytes(header) + name.encode())
    facts = facts_of(tmp_path / "image")
    assert "refers to a backing file" in (facts.refusal or "")
    assert facts.backing == (None if leads_to is None else os.path.realpath(tmp_path / leads_to))


def test_an_image_upon_another_is_made(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    base = BaseImage(path=str(tmp_path / "base.raw"), format="raw")
    replace(BlankImage(path=str(tmp_path / "top.qcow2"), format="qcow2", size_bytes=2 * MIB, base=base))
    assert (facts_of(tmp_path / "top.qcow2").backing, guest_bytes(str(tmp_path / "top.qcow2"), "qcow2")) == (base.path, 2 * MIB)


def test_what_a_guest_sees_of_an_image_is_in_its_header_or_is_all_of_it(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(qcow2()[:24] + (5 << 30).to_bytes(8, "big") + qcow2()[32:])
    assert (guest_bytes(str(image), "qcow2"), guest_bytes(str(image), "raw")) == (5 << 30, 104)
    image.write_bytes(bytes(512))
    assert guest_bytes(str(image), "qcow2") == 512
    with pytest.raises(FileNotFoundError):
        guest_bytes(str(tmp_path / "none"), "qcow2")


def test_a_header_that_is_cut_off_hides_no_backing_file(tmp_path: Path) -> None:
    secret, image = tmp_path / "secret", tmp_path / "image"
    secret.write_bytes(b"SECRET!!" * 64)
    header = bytearray(qcow2(2, backing=64, length=72))
    struct.pack_into(">I", header, 16, len(secret.name))
    struct.pack_into(">IQ", header, 20, 16, 512)
    struct.pack_into(">IQQI", header, 36, 1, 1 << 16, 1 << 17, 1)
    header[64:70] = secret.name.encode()
    image.write_bytes(header[:71])
    assert "refers to a backing file" in (facts_of(image).refusal or "")
    # This is why: QEMU reads zeros where the file has ended.
    told = subprocess.run(["qemu-img", "info", "-f", "qcow2", str(image)], capture_output=True, text=True)
    assert "backing file: secret" in told.stdout


def test_nothing_that_blocks_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        assert facts_of(tmp_path / "fifo").kind == facts_of(tmp_path / "socket").kind == "special"


def test_what_is_no_file_is_said_to_be_none(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    kinds = {tmp_path: "directory", tmp_path / "nothing": "missing", loop: "missing", tmp_path / ("x" * 300): "missing"}
    assert {path: facts_of(path).kind for path in kinds} == kinds


@pytest.mark.parametrize(
    "path", ["/dev/zero", "/proc/self/environ", "/sys/kernel/uevent_seqnum", "/dev", "/proc/self/root/etc/passwd/../../proc/1"]
)
def test_files_of_the_kernel_are_never_used(path: str) -> None:
    facts = facts_of(path)
    assert facts.refusal is not None or facts.kind != "file"
    assert not facts.readable


def test_a_link_leads_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/zero")
    assert facts_of(tmp_path / "link").kind == "special"
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "other").symlink_to("file")
    assert facts_of(tmp_path / "other").real_path == os.path.realpath(tmp_path / "file")


def test_only_files_of_the_pools_are_used(tmp_path: Path) -> None:
    pool, outside = tmp_path / "pool", tmp_path / "pool-but-another"
    for directory in (pool, outside):
        directory.mkdir()
        (directory / "file").write_bytes(b"x")
    (pool / "link").symlink_to(outside / "file")
    pools = (str(pool),)
    assert facts_of(pool / "file", pools).kind == "file"
    for path in (outside / "file", pool / "link", pool / ".." / "pool-but-another" / "file"):
        facts = facts_of(path, pools)
        assert (facts.kind, facts.readable) == ("denied", False)
        assert "outside the directories this daemon may use" in (facts.refusal or "")


def test_a_pool_may_be_a_link_to_where_there_is_room(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "file").write_bytes(b"x")
    (tmp_path / "pool").symlink_to("big")
    for pool in ("pool", "pool/"):
        assert facts_of(tmp_path / "pool" / "file", (f"{tmp_path}/{pool}",)).kind == "file"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not")
def test_what_the_daemon_may_not_open_is_told(tmp_path: Path) -> None:
    secret, closed = tmp_path / "secret", tmp_path / "closed"
    secret.write_bytes(b"QFI\xfb")
    secret.chmod(0o000)
    closed.mkdir()
    (closed / "file").touch()
    closed.chmod(0o000)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.name.startswith(("pytest-", "popen-", "test_")):
            parent.chmod(0o755)
    code = (
        "import os, sys\n"
        "from qmpd.storage import examine\n"
        "os.setuid(65534)\n"
        "for facts in examine(sys.argv[1:], ['/']).values():\n"
        "    print(facts.kind, facts.readable, facts.magic)\n"
    )
    done = subprocess.run(
        [shutil.which("python3") or "python3", "-c", code, str(secret), str(closed / "file")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(Path(msgspec.__file__).parents[1])])},
    )
    assert done.stdout.splitlines() == ["file False None", "denied False None"], done.stderr


async def test_images_and_copies_are_made_once(tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_bytes(b"variables")
    own = tmp_path / "own"
    blank = [
        BlankImage(path=f"{own}/disk0.raw", format="raw", size_bytes=3 * MIB),
        BlankImage(path=f"{own}/disk1.qcow2", format="qcow2", size_bytes=5 * MIB),
    ]
    copies = [Copy(source=str(template), target=f"{own}/vars.fd")]
    await make(blank, copies)
    assert (own / "disk0.raw").stat().st_size == 3 << 20
    assert facts_of(own / "disk1.qcow2").magic == "qcow2"
    assert (own / "vars.fd").read_bytes() == b"variables"
    assert own.stat().st_mode & 0o777 == 0o700
    for path in own.iterdir():
        path.write_bytes(b"used")
    await make(blank, copies)
    assert {path.name: path.read_bytes() for path in own.iterdir()} == dict.fromkeys(("disk0.raw", "disk1.qcow2", "vars.fd"), b"used")


async def test_a_copy_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    template = tmp_path / "template"
    template.write_bytes(b"x" * 4096)
    (tmp_path / ".vars.fd.new").symlink_to("/dev/full")
    with pytest.raises(NoSpace, match="No space left"):
        await make([], [Copy(source=str(template), target=str(tmp_path / "vars.fd"))])
    assert names(tmp_path) == {"template"}


async def test_what_the_host_refuses_is_told(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        await make([], [Copy(source=str(tmp_path / "gone"), target=str(tmp_path / "vars.fd"))])
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=r"file/disk0\.raw"):
        await make([BlankImage(path=str(tmp_path / "file" / "disk0.raw"), format="raw", size_bytes=MIB)], [])
    with pytest.raises(HostError, match=r"file/vars\.fd"):
        await make([], [Copy(source=str(tmp_path / "file"), target=str(tmp_path / "file" / "vars.fd"))])


async def test_an_image_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / ".disk0.qcow2.new").symlink_to("/dev/full")
    with pytest.raises(NoSpace, match="No space left"):
        await make([BlankImage(path=str(tmp_path / "disk0.qcow2"), format="qcow2", size_bytes=MIB)], [])
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("program", "kind", "message"),
    [
        (None, HostError, "qemu-img is not installed"),
        ("#!/bin/sh\necho 'qemu-img: x: No space left on device' >&2; exit 1\n", NoSpace, "No space left on device"),
        ("#!/bin/sh\nprintf '\\377' >&2; exit 2\n", HostError, "qemu-img create failed"),
    ],
)
async def test_a_host_without_a_working_qemu_img_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, kind: type[HostError | NoSpace], message: str
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    if program is not None:
        (tools / "qemu-img").write_text(program)
        (tools / "qemu-img").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(kind, match=message):
        await make([BlankImage(path=str(tmp_path / "own" / "disk0.qcow2"), format="qcow2", size_bytes=MIB)], [])
    assert list((tmp_path / "own").iterdir()) == []


def test_a_machines_files_are_removed_with_all_that_is_in_them(tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "deep").mkdir(parents=True)
    (own / "deep" / "file").touch()
    (own / "link").symlink_to(tmp_path)
    remove_machine_files(str(own))
    remove_machine_files(str(own))
    assert list(tmp_path.iterdir()) == []


def test_the_disks_of_a_machine_that_is_not_defined_any_more_are_not_cleared_away(tmp_path: Path) -> None:
    own = tmp_path / "m"
    make_place(str(own))
    (own / "disk0.qcow2").write_bytes(b"data")
    mark_finished(str(own))
    with pytest.raises(AlreadyExists, match=r"disk0\.qcow2.*move them away first"):
        make_place(str(own))
    assert (own / "disk0.qcow2").read_bytes() == b"data"


def test_what_an_unfinished_creation_left_is_cleared_away(tmp_path: Path) -> None:
    own = tmp_path / "m"
    make_place(str(own))
    (own / "disk0.qcow2").write_bytes(b"data")
    make_place(str(own))
    assert not (own / "disk0.qcow2").exists()


def test_a_lock_alone_is_nobodys_file(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / LOCK_NAME).touch()
    make_place(str(tmp_path / "m"))
