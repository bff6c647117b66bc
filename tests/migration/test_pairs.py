"""Guests move between QEMUs of different versions, either way, on a versioned machine type."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qmpd.migration.addresses import TcpRange
from qmpd.migration.incoming import Listen
from qmpd.migration.tls import ClientTls, ServerTls
from tests.migration.disks import NODE, Writers
from tests.migration.ends import is_tidy, moved
from tests.newer_qemu import OTHER_QEMU
from tests.process.emulator import QEMU

#: The distribution's own, where another one comes first in PATH.
INSTALLED = shutil.which("qemu-system-x86_64", path="/usr/local/bin:/usr/bin:/bin")
pytestmark = [pytest.mark.qemu, pytest.mark.skipif(OTHER_QEMU is None, reason="there is one QEMU alone (scripts/test --qemu)")]
PORTS = TcpRange(host="127.0.0.1", first=26000, last=26999)


@pytest.mark.parametrize("way", ["to-newer", "to-older"])
async def test_a_guest_and_its_disk_move_between_versions(writers: Writers, server_tls: ServerTls, client_tls: ClientTls, way: str) -> None:
    assert INSTALLED is not None
    assert Path(INSTALLED) != Path(QEMU)
    here, there = (INSTALLED, QEMU) if way == "to-newer" else (QEMU, INSTALLED)
    disk = writers.image()
    copy = writers.image(like=disk)
    source, destination = await writers.source(disk, here), await writers.destination(copy, there)
    launched = await destination.everything()
    await moved(source, destination, Listen(memory=PORTS, disks_at=PORTS, disks=(NODE,), tls=server_tls), client_tls)
    await writers.written(destination, 4)
    assert await is_tidy(destination, launched)
    await destination.monitor.execute("stop")
    writers.check(copy, source, destination)
