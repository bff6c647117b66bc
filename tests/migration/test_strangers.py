"""A port on which a machine is awaited: whoever else comes gets nothing, and harms nothing."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path

import pytest

from qmpd.pki.directory import Pki
from tests.guests.build import Guest
from tests.guests.trace import check_trace
from tests.migration.byhand import Mover, Pair, credentials, plain_argv, uuid_of
from tests.migration.network import Network
from tests.migration.onlooker import Onlooker
from tests.migration.strangers import PATIENCE_S, WORDS, breaks_off, impostors, says
from tests.migration.test_onlooker import grown, printed, until

pytestmark = pytest.mark.qemu


@pytest.fixture
def pair(guests: dict[str, Guest], laid: Network, onlooker: Onlooker, tmp_path: Path) -> Pair:
    argv = plain_argv(guests["aarch64-virt"])
    onlooker.mind(uuid_of(argv))
    return Pair(argv, laid, credentials(tmp_path, laid.stations))


def finish(pair: Pair, here: Mover, there: Mover, port: int, onlooker: Onlooker) -> None:
    """The real peer comes, and the machine is moved whole."""
    assert there.status() == "inmigrate"
    pair.send(here, port)
    there.call("cont")
    until(grown(there, 50))
    assert check_trace(printed(here, there)).whole
    assert onlooker.overlaps(pair.uuid) == []


def test_a_port_that_was_scanned_still_takes_the_machine(pair: Pair, laid: Network, onlooker: Onlooker) -> None:
    station, other = laid.stations
    with pair.source() as here, pair.destination() as there:
        until(grown(here, 50))
        port = pair.listen(there)
        for visit in (*map(says, WORDS.values()), breaks_off):
            station.inside(partial(visit, (other.address, port)))
        finish(pair, here, there, port, onlooker)


def test_a_port_is_closed_to_the_wrong_papers(pair: Pair, laid: Network, onlooker: Onlooker, tmp_path: Path) -> None:
    station, other = laid.stations
    visitors = impostors(tmp_path / "impostors", Pki(tmp_path / "authority"), "host0", station.address)
    with pair.source() as here, pair.destination() as there:
        until(grown(here, 50))
        port = pair.listen(there)
        for visit in visitors.values():
            station.inside(partial(visit, (other.address, port)))
        finish(pair, here, there, port, onlooker)


@pytest.mark.parametrize("words", [WORDS["nothing"], WORDS["half a greeting of TLS"]], ids=["nothing", "half a greeting"])
def test_one_who_says_nothing_and_stays_holds_up_a_qemu_that_listens_itself(
    pair: Pair, laid: Network, onlooker: Onlooker, words: bytes
) -> None:
    """QEMU's handshake blocks its main loop, monitor included, so nobody but the peer may get through to it. It recovers."""
    station, other = laid.stations
    with pair.source() as here, pair.destination() as there:
        until(grown(here, 50))
        port = pair.listen(there)
        with station.inside(partial(socket.create_connection, (other.address, port), PATIENCE_S)) as stranger:
            stranger.sendall(words)
            until(lambda: "recv" in Path(f"/proc/{there.pid}/stack").read_text())
        finish(pair, here, there, port, onlooker)
