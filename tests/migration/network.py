"""Hosts' networks: a namespace for each, joined by veths to a switch in one more, which can be cut, slowed and healed.

Needs root. The names are unique to the process and the block, and everything is gone when the block is left.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from tests.migration.guardian import Guardian, guarding

#: `ip` and `tc` need milliseconds; on a host short of processors more.
TOOL_LIMIT_S: Final = 60.0
#: Nobody's network (RFC 5737).
NETWORK: Final = "192.0.2"
MASK: Final = 24
DEVICE: Final = "eth0"
SWITCH: Final = "switch"
#: A MAC address that nobody has: what is sent there is sent, and arrives nowhere.
NOBODY: Final = "02:00:00:00:00:fe"
#: States of a port of the bridge (STP): what comes through a disabled one is dropped, and neither side is told.
DISABLED, FORWARDING = "0", "3"

#: Of setns(2): a network namespace.
CLONE_NEWNET: Final = 0x40000000

T = TypeVar("T")
_numbers: Final = itertools.count()


class NoNetworks(Exception):
    """This user may not make network namespaces, or the tools for it are not installed; the message says which."""


class Station(msgspec.Struct, frozen=True, kw_only=True):
    """A namespace with one address in the common network."""

    name: str
    number: int

    @property
    def address(self) -> str:
        """Its address."""
        return f"{NETWORK}.{self.number + 1}"

    @property
    def within(self) -> tuple[str, ...]:
        """Put before a command, runs it here: as the same process, with the same files."""
        return ("nsenter", f"--net=/run/netns/{self.name}")

    def inside(self, work: Callable[[], T]) -> T:
        """What `work` returns, which is called here: in a thread that belongs to the namespace. Sockets made there stay there."""
        with ThreadPoolExecutor(1, thread_name_prefix=f"in:{self.name}", initializer=_enter, initargs=(self.name,)) as thread:
            return thread.submit(work).result()

    @property
    def mac(self) -> str:
        """Its link address."""
        return f"02:00:00:00:00:{self.number + 1:02x}"

    @property
    def port(self) -> str:
        """The switch's end of its cable."""
        return f"port{self.number}"


class Network:
    """Stations on one switch. Whatever was cut is said to the kernel alone: nobody who has a connection through it hears of it."""

    def __init__(self, prefix: str, count: int) -> None:
        self.stations = tuple(Station(name=f"{prefix}h{number}", number=number) for number in range(count))
        self._switch = f"{prefix}sw"
        self._guardian: Guardian | None = None

    @contextmanager
    def laid(self) -> Iterator[None]:
        """The namespaces and the cables, for as long as the block lasts."""
        with ExitStack() as stack:
            self._guardian = guardian = stack.enter_context(guarding())
            for name in (self._switch, *(station.name for station in self.stations)):
                guardian.network(name)
                _run("ip", "netns", "add", name)
                stack.callback(_forgiving, "ip", "netns", "del", name)
                _inside(name, "ip", "link", "set", "lo", "up")
            _inside(self._switch, "ip", "link", "add", SWITCH, "type", "bridge")
            _inside(self._switch, "ip", "link", "set", SWITCH, "up")
            for station in self.stations:
                self._plug(station)
            yield

    def belongs(self, directory: Path) -> None:
        """A directory goes when the network does, even where whoever made it was killed."""
        if self._guardian is not None:
            self._guardian.files(directory)

    def cut(self, *stations: Station) -> None:
        """Nothing goes in or out of these any more (all, where none is named), and no side is told: their links stay up."""
        self._ports(stations, DISABLED)

    def heal(self) -> None:
        """Everything goes everywhere again, at full speed."""
        for station in self.stations:
            _inside(station.name, "ip", "link", "set", DEVICE, "up")
            _forgiving("tc", "-n", station.name, "qdisc", "del", "dev", DEVICE, "root")
            _inside(station.name, "ip", "neigh", "flush", "nud", "permanent", "dev", DEVICE)
        # A port without a carrier cannot be told to forward.
        self._ports((), FORWARDING)

    def unplug(self, station: Station) -> None:
        """The station's own interface is down: what it sends is refused there and then."""
        _inside(station.name, "ip", "link", "set", DEVICE, "down")

    def deafen(self, station: Station, towards: Station) -> None:
        """What the one sends to the other is lost; the other way everything goes on."""
        _inside(station.name, "ip", "neigh", "replace", towards.address, "lladdr", NOBODY, "nud", "permanent", "dev", DEVICE)

    def slow(self, mbit_s: int) -> None:
        """No station sends faster than this."""
        for station in self.stations:
            rate = ("rate", f"{mbit_s}mbit", "burst", "64k", "latency", "50ms")
            _inside(station.name, "tc", "qdisc", "replace", "dev", DEVICE, "root", "tbf", *rate)

    def _plug(self, station: Station) -> None:
        here = self._switch
        _inside(here, "ip", "link", "add", station.port, "type", "veth", "peer", "name", DEVICE, "netns", station.name)
        _inside(here, "ip", "link", "set", station.port, "master", SWITCH, "up")
        _inside(station.name, "ip", "link", "set", DEVICE, "address", station.mac, "up")
        _inside(station.name, "ip", "address", "add", f"{station.address}/{MASK}", "dev", DEVICE)

    def _ports(self, stations: tuple[Station, ...], state: str) -> None:
        for station in stations or self.stations:
            _inside(self._switch, "bridge", "link", "set", "dev", station.port, "state", state)


@contextmanager
def network(count: int = 2) -> Iterator[Network]:
    """A network of its own, of so many stations. Raises NoNetworks."""
    made = Network(f"qm{os.getpid():x}-{next(_numbers)}-", count)
    with made.laid():
        yield made


def leftovers() -> list[str]:
    """The namespaces this process made that are still there."""
    said = subprocess.run(["ip", "-json", "netns", "list"], check=True, capture_output=True, timeout=TOOL_LIMIT_S).stdout
    return [entry["name"] for entry in json.loads(said or b"[]") if entry["name"].startswith(f"qm{os.getpid():x}-")]


def _enter(name: str) -> None:
    """Takes this thread into a network namespace."""
    with Path(f"/run/netns/{name}").open("rb") as place:
        if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _inside(name: str, tool: str, *words: str) -> None:
    _run(tool, "-n", name, *words)


def _run(*words: str) -> None:
    try:
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=TOOL_LIMIT_S)
    except FileNotFoundError as error:
        raise NoNetworks(f"{words[0]} is not installed (Debian: iproute2)") from error
    if done.returncode != 0:
        raise NoNetworks(f"{' '.join(words)}: {done.stderr.strip()}")


def _forgiving(*words: str) -> None:
    subprocess.run(words, check=False, capture_output=True, timeout=TOOL_LIMIT_S)
