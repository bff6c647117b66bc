"""The network that migrations are tested in does what it says: whole, cut, deaf in one direction, unplugged, slow, and gone afterwards."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.migration.network import Network, Station

#: Answers every datagram with the same bytes.
ECHO = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
    peer.bind((sys.argv[1], 7))
    print("ready", flush=True)
    while True:
        data, sender = peer.recvfrom(64)
        print("heard", flush=True)
        peer.sendto(data, sender)
"""
#: Sends a datagram and says whether it came back; silence is what a cut line has to say.
ASK = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
    peer.settimeout(float(sys.argv[2]))
    try:
        peer.sendto(b"x", (sys.argv[1], 7))
        print("answered" if peer.recv(64) == b"x" else "garbled")
    except TimeoutError:
        print("silence")
    except OSError:
        print("refused")
"""
#: On a whole line an answer takes microseconds.
ANSWER_S = 60.0
#: How long a line that must be silent is listened to.
SILENCE_S = 0.3


@pytest.fixture
def echo(laid: Network) -> Iterator[subprocess.Popen[str]]:
    """Answers at the second station."""
    station = laid.stations[1]
    command = [*station.within, sys.executable, "-c", ECHO, station.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def ask(station: Station, other: Station, patience_s: float) -> str:
    command = [*station.within, sys.executable, "-c", ASK, other.address, str(patience_s)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_line_is_cut_and_healed(laid: Network, echo: subprocess.Popen[str]) -> None:
    here, there = laid.stations
    assert ask(here, there, ANSWER_S) == "answered"
    laid.cut(there)
    assert ask(here, there, SILENCE_S) == "silence"
    laid.heal()
    assert ask(here, there, ANSWER_S) == "answered"
    laid.unplug(here)
    assert ask(here, there, SILENCE_S) == "refused"
    laid.heal()
    laid.slow(10)
    assert ask(here, there, ANSWER_S) == "answered"
    laid.heal()
    assert ask(here, there, ANSWER_S) == "answered"
    assert echo.poll() is None


def test_a_line_is_deaf_in_one_direction(laid: Network, echo: subprocess.Popen[str]) -> None:
    here, there = laid.stations
    assert echo.stdout is not None
    assert ask(here, there, ANSWER_S) == "answered"
    assert echo.stdout.readline() == "heard\n"
    laid.deafen(there, towards=here)
    assert ask(here, there, SILENCE_S) == "silence"
    assert echo.stdout.readline() == "heard\n"
    laid.heal()
    assert ask(here, there, ANSWER_S) == "answered"


#: Makes a network with a directory and a process in it, and ends without leaving the block.
ABANDONED = """
import subprocess, sys, tempfile, pathlib
from tests.migration.network import network
with network() as made:
    directory = pathlib.Path(tempfile.mkdtemp(prefix="qh-"))
    made.belongs(directory)
    process = subprocess.Popen([*made.stations[0].within, "sleep", "1000"], start_new_session=True, stdout=subprocess.DEVNULL)
    print(made.stations[0].name, directory, process.pid, flush=True)
    sys.stdin.read()
"""


def test_nothing_is_left_of_a_network_whose_test_was_killed(laid: Network) -> None:
    with subprocess.Popen([sys.executable, "-c", ABANDONED], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as test:
        assert test.stdout is not None
        name, directory, pid = test.stdout.readline().split()
        assert Path("/run/netns", name).exists()
        test.kill()
    deadline = time.monotonic() + ANSWER_S
    while Path("/run/netns", name).exists() or Path(directory).exists() or _runs(pid):
        assert time.monotonic() < deadline, f"{name}, {directory} or {pid} is left"
        time.sleep(0.05)


def _runs(pid: str) -> bool:
    """Whether there is such a process; one that nobody has reaped yet does not run."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
