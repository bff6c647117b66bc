"""Every test guest does what its variant promises, straight under its emulator."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.guests.build import build_all
from tests.guests.catalogue import Guest, Variant, load, recipes
from tests.guests.ring import acknowledged, missing, read_ring
from tests.guests.running import running
from tests.guests.trace import LINE_BYTES, check_trace
from tests.newer_qemu import GUESTS, skip_where_it_differs
from tests.unavailable import unavailable

pytestmark = pytest.mark.qemu

CATALOGUE = {recipe.guest.name: recipe.guest for recipe in recipes(load())}
COUNTED_CHARACTERS = 2 * LINE_BYTES
FLOOD_CHARACTERS = 100_000
BOOTS = 5
BLOCKS = 30


def named(*variants: Variant) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for name, guest in CATALOGUE.items() if guest.variant in variants])


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Guest]:
    return build_all(tmp_path_factory.mktemp("guests"))


@pytest.fixture
def guest(name: str, guests: dict[str, Guest]) -> Guest:
    emulator = f"qemu-system-{CATALOGUE[name].arch_emulator}"
    if shutil.which(emulator) is None:
        unavailable(f"{emulator} is not installed")
    skip_where_it_differs(name, GUESTS)
    return guests[name]


def line(guest: Guest) -> bytes:
    return guest.banner.encode() + b"\r\n"


@named("count", "flood")
def test_a_counting_guest_prints_its_stream_without_a_break(guest: Guest) -> None:
    wanted = FLOOD_CHARACTERS if guest.variant == "flood" else COUNTED_CHARACTERS
    with running(guest) as machine:
        machine.read_until(lambda output: line(guest) in output)
        output = machine.read_until(lambda output: len(output) - output.index(line(guest)) >= len(line(guest)) + wanted)
    trace = check_trace(output)
    assert trace.breaks == ()
    assert (trace.guest, trace.boots, trace.start) == (guest.name, 1, 0)
    assert trace.characters >= wanted


@named("quiet")
def test_a_quiet_guest_says_its_name_and_sleeps(guest: Guest) -> None:
    with running(guest) as machine:
        machine.read_until(lambda output: line(guest) in output)
        machine.settle()
        assert machine.output.endswith(line(guest))


@named("echo")
def test_an_echo_guest_answers_in_upper_case(guest: Guest) -> None:
    with running(guest) as machine:
        machine.read_until(lambda output: line(guest) in output)
        machine.send(b"hello, World 42 {az}~\r")
        output = machine.read_until(lambda output: output.endswith(b"\r"))
    assert output.endswith(line(guest) + b"HELLO, WORLD 42 {AZ}~\r")


@named("reset")
def test_a_resetting_guest_boots_again_and_again(guest: Guest) -> None:
    with running(guest) as machine:
        output = machine.read_until(lambda output: output.count(line(guest)) >= BOOTS)
    assert check_trace(output).boots >= BOOTS


@named("poweroff")
def test_a_guest_that_powers_off_ends_its_emulator(guest: Guest) -> None:
    with running(guest) as machine:
        assert machine.wait_exit() == 0
        assert machine.output.endswith(line(guest))


@named("blocks")
def test_every_block_a_writer_reports_is_on_the_disk(guest: Guest, tmp_path: Path) -> None:
    disk = Path(shutil.copy(guest.file, tmp_path / "disk.img"))
    with running(guest, image=disk) as machine:
        output = machine.read_until(lambda output: acknowledged(output).last >= BLOCKS)
    said = acknowledged(output)
    ring = read_ring(disk)
    assert (said.gaps, said.errors, ring.torn) == ((), 0, ())
    assert missing(ring, said.last) == ()


@named("tpm")
def test_a_guest_for_a_tpm_says_when_there_is_none(guest: Guest) -> None:
    with running(guest) as machine:
        machine.read_until(lambda output: output.endswith(line(guest) + b"TPM none\r\n"))
