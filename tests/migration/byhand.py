"""QEMUs that are moved by hand, over raw QMP sockets: what qmpd's moves are held against, and what shows that the onlooker sees.

The recipe is the plainest that is safe, with the capabilities and the kind of TLS that qmpd uses: the destination `-S`, and `cont`
there once the source says `completed`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self

import msgspec

from qmpd.migration.capabilities import DESTINATION, SOURCE
from qmpd.migration.tls import PRIORITY
from qmpd.pki.directory import Pki
from scripts.lib.bench_floor import ByHand
from tests.guests.catalogue import Guest
from tests.guests.running import command
from tests.migration.emulators import emulators
from tests.migration.network import Network, Station

CREDENTIALS: Final = "tls0"
ALLOWED: Final = "allowed"
STARTS: Final = 3
#: What a status of a migration means that has failed.
FAILED: Final = frozenset({"failed", "cancelled"})


class Refused(Exception):
    """QEMU answered with an error; the message is its own."""


class MoveFailed(Exception):
    """The migration ended without having moved anything; the message is the source's."""


class Mover(ByHand):
    """A QEMU by hand that can be told anything, and whose events are kept in the order in which they came."""

    def __init__(self, argv: Sequence[str], *, halted: bool = True, plain_console: bool = True, within: Sequence[str] = ()) -> None:
        super().__init__(argv, halted=halted, plain_console=plain_console, within=within)
        self.events: list[Mapping[str, object]] = []

    def __enter__(self) -> Self:
        """QEMU 7.2 may never hear the very first client it has (see tests/qmp/conftest.py): another one is started then."""
        for _ in range(STARTS - 1):
            with suppress(TimeoutError):
                return super().__enter__()
        return super().__enter__()

    def call(self, command_: str, arguments: Mapping[str, object] | None = None) -> object:
        """A command's answer. Raises Refused."""
        self._stream.write(json.dumps({"execute": command_, "arguments": dict(arguments or {})}).encode())
        self._stream.flush()
        while True:
            said = self._said()
            if "return" in said:
                return said["return"]
            if "error" in said:
                raise Refused(f"{command_}: {said['error']}")
            self.events.append(said)

    def wait(self, wanted: Callable[[Mapping[str, object]], bool]) -> Mapping[str, object]:
        """The first event like this: one that was heard already, or the next that comes."""
        for said in self.events:
            if wanted(said):
                return said
        while True:
            said = self._said()
            self.events.append(said)
            if wanted(said):
                return said

    def status(self) -> str:
        """What `query-status` says."""
        answer = self.call("query-status")
        assert isinstance(answer, dict)
        return str(answer["status"])

    def _said(self) -> Mapping[str, object]:
        line = self._stream.readline()
        if not line:
            raise Refused("QEMU ended")
        said = json.loads(line)
        assert isinstance(said, dict)
        return said


class Credentials(msgspec.Struct, frozen=True, kw_only=True):
    """Directories with certificates of two hosts of one authority, under names that both know."""

    directories: tuple[Path, Path]
    names: tuple[str, str]


def credentials(directory: Path, stations: Sequence[Station]) -> Credentials:
    """Certificates for two stations, made with the code of `qmpd pki`."""
    authority = Pki(directory / "authority")
    authority.init("testers")
    names = tuple(f"host{station.number}" for station in stations)
    places = tuple(directory / name for name in names)
    for place, name, station in zip(places, names, stations, strict=True):
        hosted(authority, place, name, station.address)
    return Credentials(directories=(places[0], places[1]), names=(names[0], names[1]))


def hosted(authority: Pki, place: Path, name: str, address: str) -> None:
    """Issues a host's certificate and puts it in its place."""
    authority.store(place, authority.issue(name, "peer", (name, address)))


def plain_argv(guest: Guest, *options: str, name: str | None = None) -> tuple[str, ...]:
    """A command that `ByHand` runs: a guest of ours, with a diary of its own, under a new UUID or the one given."""
    program, *words = command(guest, "chardev:serial0")
    arch = program.rpartition("-")[2]
    sockets = ("-chardev", "socket,id=qmp,fd=0,server=on,wait=off", "-qmp", "chardev:qmp", "-chardev", "pipe,id=serial0,path=console")
    return (emulators().program(arch), *words, *sockets, "-uuid", name or str(uuid.uuid4()), "-S", *options)


def uuid_of(argv: Sequence[str]) -> str:
    """The UUID in a command."""
    return argv[argv.index("-uuid") + 1]


class Pair:
    """A QEMU at one station that is to be moved, and how to make the one at the other that it is moved to."""

    def __init__(self, argv: Sequence[str], network: Network, trusted: Credentials) -> None:
        self.uuid = uuid_of(argv)
        self._argv = tuple(argv)
        self._network = network
        self._trusted = trusted

    @contextmanager
    def source(self, at: int = 0) -> Iterator[Mover]:
        """The machine, running."""
        with Mover(self._argv, halted=False, within=self._network.stations[at].within) as made:
            yield made

    @contextmanager
    def destination(self, at: int = 1, *, halted: bool = True) -> Iterator[Mover]:
        """One that waits to be moved to, not listening yet. `halted` False: it runs as soon as it has everything, unasked."""
        argv = self._argv if halted else tuple(word for word in self._argv if word != "-S")
        with Mover((*argv, "-incoming", "defer"), within=self._network.stations[at].within) as made:
            yield made

    def listen(self, there: Mover, at: int = 1) -> int:
        """Has the destination listen with TLS, for the source's certificate alone; the port."""
        station, source = self._network.stations[at], self._trusted.names[1 - at]
        there.call("object-add", self._credentials(at, "server"))
        rule = {"match": f"O=qmpd,OU=peer,CN={source}", "policy": "allow", "format": "exact"}
        there.call("object-add", {"qom-type": "authz-list", "id": ALLOWED, "policy": "deny", "rules": [rule]})
        there.call("migrate-set-parameters", {"tls-creds": CREDENTIALS, "tls-authz": ALLOWED})
        there.call("migrate-set-capabilities", _capabilities(*DESTINATION))
        there.call("migrate-incoming", {"uri": f"tcp:{station.address}:0"})
        answer = there.call("query-migrate")
        assert isinstance(answer, dict)
        return int(answer["socket-address"][0]["port"])

    def send(self, here: Mover, port: int, at: int = 1) -> None:
        """Moves the whole state to where one listens; returns when the source says that it is `completed`. Raises MoveFailed."""
        # It may have been a destination before, and said then what is waited for now.
        here.events.clear()
        here.call("object-add", self._credentials(1 - at, "client"))
        here.call("migrate-set-parameters", {"tls-creds": CREDENTIALS, "tls-hostname": self._trusted.names[at], "max-bandwidth": 1 << 40})
        here.call("migrate-set-capabilities", _capabilities(*SOURCE))
        here.call("migrate", {"uri": f"tcp:{self._network.stations[at].address}:{port}"})
        _until(here, "pre-switchover")
        here.call("migrate-continue", {"state": "pre-switchover"})
        _until(here, "completed")

    def _credentials(self, at: int, endpoint: str) -> dict[str, object]:
        place = str(self._trusted.directories[at])
        creds = {"qom-type": "tls-creds-x509", "id": CREDENTIALS, "dir": place, "verify-peer": True, "priority": PRIORITY}
        return {**creds, "endpoint": endpoint}


def move(pair: Pair, here: Mover, there: Mover) -> None:
    """The whole of it: listen, send, run there, end here."""
    pair.send(here, pair.listen(there))
    there.call("cont")
    here.quit()


def _until(here: Mover, wanted: str) -> None:
    def over(said: Mapping[str, object]) -> bool:
        return _state(said) in {wanted, *FAILED}

    if (state := _state(here.wait(over))) != wanted:
        answer = here.call("query-migrate")
        raise MoveFailed(f"{state}: {answer.get('error-desc') if isinstance(answer, dict) else answer}")


def _state(said: Mapping[str, object]) -> object:
    data = said.get("data")
    return data.get("status") if said.get("event") == "MIGRATION" and isinstance(data, dict) else None


def _capabilities(*names: str) -> dict[str, object]:
    return {"capabilities": [{"capability": name, "state": True} for name in names]}
