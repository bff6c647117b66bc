"""The installed emulators are asked about themselves."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx

from qmpd.facts import EmulatorFacts
from qmpd.probe import Emulators
from tests.newer_qemu import skip_with_start_script
from tests.process.emulator import children
from tests.unavailable import tool, unavailable

pytestmark = pytest.mark.qemu

#: The smallest emulators there are: cheap to copy.
SMALL = "qemu-system-avr"
MICROVM = Path("/usr/bin/qemu-system-x86_64-microvm")


@pytest.fixture(autouse=True)
def _no_blocking_calls() -> Iterator[None]:
    with blockbuster_ctx("qmpd"):
        yield


@pytest.fixture
def emulators(tmp_path: Path) -> Emulators:
    """Those on PATH, with nothing remembered."""
    return Emulators(str(tmp_path / "cache"))


@pytest.fixture
def small() -> Path:
    """A small emulator."""
    return Path(tool(SMALL, "qemu-system-misc"))


async def test_every_installed_emulator_answers(emulators: Emulators) -> None:
    others = children()  # of tests before this one in the same process
    found = await emulators.all()
    assert found
    for item in found:
        assert isinstance(item, EmulatorFacts), item
        assert item.machine("none") is not None
        assert item.devices
        assert "quit" in item.commands
        assert "screendump.format=png" in item.features
        assert "tcg" in item.accelerators
    assert children() <= others


async def test_what_x86_64_is_known_to_have_is_found(emulators: Emulators) -> None:
    facts = await emulators.get("x86_64")
    assert facts.target == "x86_64"
    assert int(facts.version.split(".")[0]) >= 7
    q35 = facts.machine("q35")
    assert q35 is not None
    assert q35.name.startswith("pc-q35-")
    assert q35.default_ram_id == "pc.ram"
    assert {"max", "qemu64"} <= set(facts.cpus)
    assert {"virtio-blk-pci", "virtio-net-pci", "e1000"} <= facts.devices
    assert {"device_add", "blockdev-add", "query-status"} <= facts.commands
    assert {"netdev_add.type=stream", "device_add#json-cli", "migrate-set-capabilities.capabilities.capability=multifd"} <= facts.features
    assert {"sandbox", "chardev", "action"} <= facts.options


async def test_abstract_devices_are_not_offered(emulators: Emulators) -> None:
    assert "pci-device" not in (await emulators.get("x86_64")).devices


async def test_one_question_starts_one_emulator(emulators: Emulators, tmp_path: Path) -> None:
    await emulators.get("x86_64")
    again = Emulators(str(tmp_path / "cache"))
    assert (await again.get("qemu-system-x86_64")).path == (await emulators.get("x86_64")).path


async def test_a_start_script_is_asked_again_when_the_program_behind_it_changes(small: Path, tmp_path: Path) -> None:
    skip_with_start_script()
    behind = tmp_path / "build" / "emulator"
    behind.parent.mkdir()
    shutil.copy(small, behind)
    script = tmp_path / "qemu-system-avr"
    script.write_text(f'#!/bin/sh\necho start >> {tmp_path}/starts\nexec {behind} "$@"\n')
    script.chmod(0o755)
    emulators = Emulators(None, (str(script),), "")
    await emulators.get("avr")
    await emulators.get("avr")
    os.utime(behind, ns=(0, 0))
    await emulators.get("avr")
    assert (tmp_path / "starts").read_text() == "start\n" * 2


async def test_a_build_without_tcg_answers_too() -> None:
    if not os.access(MICROVM, os.X_OK):
        unavailable("Debian's microvm build is not installed (the package qemu-system-x86)")
    facts = await Emulators(None, (str(MICROVM),), "").get(str(MICROVM))
    assert facts.accelerators == {"kvm"}
    assert facts.machine("microvm") is not None
