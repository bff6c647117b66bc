"""Fixtures of the migration tests: pairs of real QEMUs, the certificates of two hosts, a network, and somebody who looks on."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from qmpd import commands
from qmpd.credentials import FFDHE2048, PARAMETERS
from qmpd.migration.tls import ClientTls, ServerTls
from qmpd.pki.directory import AUTHORITY, REVOKED, Pki
from tests.api.lab import reserved
from tests.guests.build import Guest
from tests.migration.disks import Writers
from tests.migration.ends import Ends, ends_in
from tests.migration.network import Network, NoNetworks, leftovers, network
from tests.migration.onlooker import Onlooker, onlooking
from tests.process.emulator import PATIENCE_S, emulators_in
from tests.unavailable import unavailable


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory whose name leaves room for socket paths, which tmp_path does not."""
    path = Path(tempfile.mkdtemp(prefix="q"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that are to be answered may take as long as a busy host needs."""
    monkeypatch.setattr(commands, "QUERY_DEADLINE_S", PATIENCE_S)


@pytest.fixture
async def ends(directory: Path, guests: dict[str, Guest]) -> AsyncIterator[Ends]:
    """Starts QEMUs with a counting guest; kills them at the end."""
    async with emulators_in(directory) as emulators, ends_in(directory, emulators, guests["x86_64-microvm"]) as made:
        yield made


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port of the loopback at which nobody listens, and that nobody else gets by chance."""
    with reserved() as number:
        yield number


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificates of `hosta`, `hostb` and `hostc`, each in a directory of its name, by one authority; and `stranger`, by another."""
    root = tmp_path_factory.mktemp("pki")
    for authority, names in (("ca", ("hosta", "hostb", "hostc")), ("otherca", ("stranger",))):
        ca = Pki(root / authority)
        ca.init(authority)
        listed = ca.read(AUTHORITY), ca.read(REVOKED)
        for name in names:
            made = ca.issue(name, "peer", ["127.0.0.1"])
            assert listed[0] is not None
            assert listed[1] is not None
            Pki(root / name).install(made, listed[0], listed[1])
            (root / name / PARAMETERS).write_text(FFDHE2048)  # or each QEMU that waits would search for some
    return root


@pytest.fixture
def server_tls(hosts: Path) -> ServerTls:
    """That of a destination on `hostb` which awaits `hosta`."""
    return ServerTls(directory=str(hosts / "hostb"), admits="O=qmpd,OU=peer,CN=hosta")


@pytest.fixture
def client_tls(hosts: Path) -> ClientTls:
    """That of a source on `hosta` which looks for `hostb`."""
    return ClientTls(directory=str(hosts / "hosta"), hostname="hostb")


@pytest.fixture
def laid() -> Iterator[Network]:
    """Two stations and what joins them."""
    try:
        with network() as made:
            yield made
    except NoNetworks as reason:
        unavailable(reason)
    assert not leftovers()


@pytest.fixture
def onlooker() -> Iterator[Onlooker]:
    """Looks at every QEMU whose machine it is told to mind."""
    with onlooking() as made:
        yield made


@pytest.fixture
def writers(ends: Ends, guests: dict[str, Guest]) -> Writers:
    """Starts QEMUs with a guest that writes to its disk."""
    return Writers(ends, guests["x86_64-pc-blocks"])
