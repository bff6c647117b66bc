"""KVM is judged by a measurement, and the guests it is measured with really run."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from blockbuster import blockbuster_ctx

from qmpd import accelerator, factcache, loopguest
from qmpd.accelerator import CACHE_FILE, WORTHWHILE, Accelerators, CacheFile, open_device, run
from qmpd.errors import NotFound, QemuError
from qmpd.facts import EmulatorFacts
from qmpd.loopguest import LOOP_GUESTS
from qmpd.probe import Emulators
from tests.conftest import CACHE
from tests.process.emulator import children
from tests.unavailable import tool, unavailable

pytestmark = pytest.mark.qemu

#: A test guest runs for less than half a second under TCG; the rest is for a busy host.
PATIENCE_S = 60.0
HOST = os.uname().machine


@pytest.fixture(autouse=True)
def _no_blocking_calls() -> Iterator[None]:
    with blockbuster_ctx("qmpd"):
        yield


async def emulator(target: str) -> EmulatorFacts:
    """The installed emulator of this target."""
    try:
        return await Emulators(str(CACHE)).get(target)
    except NotFound as error:
        unavailable(error.message)


@pytest.mark.parametrize(
    ("target", "machine"),
    [("x86_64", "q35"), ("x86_64", "pc"), ("x86_64", "microvm"), ("i386", "q35"), ("aarch64", "virt"), ("riscv64", "virt")],
)
async def test_a_test_guest_runs_to_its_end(target: str, machine: str) -> None:
    guest = msgspec.structs.replace(LOOP_GUESTS[target], machines=(machine,))
    seconds = await run(await emulator(target), guest, "tcg", PATIENCE_S)
    assert seconds is not None


async def test_a_guest_that_computes_wrongly_never_ends() -> None:
    guest = LOOP_GUESTS["x86_64"]
    start = guest.image.index(bytes.fromhex("69c0"))  # imul $1664525, %eax, %eax
    others = children()  # of tests before this one in the same process
    wrong = guest.image[: start + 2] + bytes.fromhex("0e661900") + guest.image[start + 6 :]
    assert await run(await emulator("x86_64"), msgspec.structs.replace(guest, image=wrong), "tcg", 2.0) is None
    assert children() <= others


async def test_an_accelerator_qemu_does_not_have_is_an_error() -> None:
    with pytest.raises(QemuError, match="invalid accelerator"):
        await run(await emulator("x86_64"), LOOP_GUESTS["x86_64"], "none-such", PATIENCE_S)


async def test_another_exit_than_the_guests_is_an_error() -> None:
    guest = msgspec.structs.replace(LOOP_GUESTS["x86_64"], exit_code=7)
    with pytest.raises(QemuError, match="exit code 85 instead of 7"):
        await run(await emulator("x86_64"), guest, "tcg", PATIENCE_S)


async def test_the_verdict_on_this_host_is_measured_once(tmp_path: Path) -> None:
    facts = await emulator(HOST)
    verdict = await Accelerators(str(tmp_path)).verdict(facts)
    assert verdict.reason
    if verdict.usable:
        assert verdict.ratio is not None
        assert verdict.ratio >= WORTHWHILE
    if verdict.ratio is None:
        pytest.skip(f"KVM could not be tried: {verdict.reason}")
    cached = await asyncio.to_thread(factcache.read, tmp_path / CACHE_FILE, CacheFile)
    assert cached is not None
    assert [entry.verdict for entry in cached.measured] == [verdict]
    # Another measurement would give another ratio.
    assert await Accelerators(str(tmp_path)).verdict(facts) == verdict


async def test_what_was_measured_before_another_boot_is_measured_again(tmp_path: Path) -> None:
    facts = await emulator(HOST)
    verdict = await Accelerators(str(tmp_path)).verdict(facts)
    cached = await asyncio.to_thread(factcache.read, tmp_path / CACHE_FILE, CacheFile)
    if cached is None or not cached.measured:
        pytest.skip(f"KVM could not be tried: {verdict.reason}")
    older = [msgspec.structs.replace(entry, boot_id="another", verdict=accelerator.compared(1.0, 0.001, 4.0)) for entry in cached.measured]
    await asyncio.to_thread(factcache.write, tmp_path / CACHE_FILE, CacheFile(format=cached.format, measured=tuple(older)))
    assert (await Accelerators(str(tmp_path)).verdict(facts)).ratio != 1000.0


async def test_a_host_without_the_device_is_told_how_to_get_it(tmp_path: Path) -> None:
    verdict = await Accelerators(None, device=str(tmp_path / "kvm")).verdict(await emulator(HOST))
    assert not verdict.usable
    assert "modprobe" in verdict.reason


async def test_a_device_that_fails_to_open_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    verdict = await Accelerators(None, device=str(tmp_path / "file" / "kvm")).verdict(await emulator(HOST))
    assert verdict.reason.endswith("Not a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_a_device_that_may_not_be_opened_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "kvm"
    path.write_text("")
    path.chmod(0)
    assert open_device(str(path)).state == "denied"


async def test_a_foreign_emulator_is_not_measured() -> None:
    verdict = await Accelerators(None, host="aarch64").verdict(await emulator("x86_64"))
    assert (verdict.usable, verdict.ratio) == (False, None)
    assert verdict.reason == "foreign architecture: x86_64 guests on a host that is aarch64"


async def test_an_emulator_without_kvm_is_not_measured() -> None:
    facts = msgspec.structs.replace(await emulator("x86_64"), accelerators=frozenset({"tcg"}))
    assert (await Accelerators(None, host="x86_64").verdict(facts)).reason.endswith("was built without KVM")


async def test_a_target_without_a_test_guest_is_left_to_tcg(tmp_path: Path) -> None:
    facts = msgspec.structs.replace(await emulator("x86_64"), target="s390x")
    (tmp_path / "kvm").write_text("")
    verdict = await Accelerators(None, host="s390x", device=str(tmp_path / "kvm")).verdict(facts)
    assert (verdict.usable, verdict.reason) == (False, 'nothing measures KVM for s390x here: say accel = "kvm" to use it')


@pytest.mark.parametrize(
    ("tcg_s", "kvm_s", "usable", "reason", "ratio"),
    [
        (0.2, 0.02, True, "KVM runs guests 10.0 times as fast as TCG", 10.0),
        (0.2, 0.18, False, "KVM runs guests 1.1 times as fast as TCG", 1.11),
        (0.2, 1.0, False, "KVM runs guests 0.2 times as fast as TCG", 0.2),
        (0.2, None, False, "KVM runs guests more than 10 times slower than TCG (stopped after 2.0 s)", 0.1),
        (0.0, 0.02, True, "KVM runs guests, and this emulator has no TCG", None),
        (0.0, None, False, "KVM runs guests too slowly (stopped after 2.0 s)", None),
    ],
)
def test_two_running_times_make_a_verdict(tcg_s: float, kvm_s: float | None, usable: bool, reason: str, ratio: float | None) -> None:
    verdict = accelerator.compared(tcg_s, kvm_s, 2.0)
    assert (verdict.usable, verdict.reason) == (usable, reason)
    assert verdict.ratio == (ratio if ratio is None else pytest.approx(ratio, rel=0.01))


@pytest.mark.parametrize(
    ("name", "prefix", "flags"),
    [("_X86", "", ("--32",)), ("_AARCH64", "aarch64-linux-gnu-", ()), ("_RISCV64", "riscv64-linux-gnu-", ("-march=rv64ima", "-mabi=lp64"))],
)
def test_the_bytes_of_a_test_guest_are_those_of_its_source(name: str, prefix: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    if not prefix and HOST != "x86_64":
        pytest.skip("this host's own assembler is another one")
    tool(f"{prefix}as", f"binutils-{prefix.rstrip('-')}".rstrip("-"))
    module = Path(loopguest.__file__).read_text()
    found = re.search(rf"((?:^#.*\n)+){name}: Final", module, re.MULTILINE)
    assert found is not None
    source = "".join(f"{line[6:]}\n" for line in found[1].splitlines() if line.startswith("#     "))
    paths = {kind: str(tmp_path / kind) for kind in ("object", "linked", "raw")}
    link = [f"{prefix}ld", *(["-m", "elf_i386"] if not prefix else []), "-Ttext=0", "-e", "0", "-o", paths["linked"], paths["object"]]
    subprocess.run([f"{prefix}as", *flags, "-o", paths["object"], "-"], input=source, text=True, check=True)
    subprocess.run(link, check=True)
    subprocess.run([f"{prefix}objcopy", "-O", "binary", "-j", ".text", paths["linked"], paths["raw"]], check=True)
    assert Path(paths["raw"]).read_bytes() == getattr(loopguest, name)
