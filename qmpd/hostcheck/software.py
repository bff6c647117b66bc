"""What is installed: emulators, qemu-img and swtpm."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from qmpd import tpm
from qmpd.accelerator import NATIVE
from qmpd.facts import EmulatorFacts
from qmpd.hostcheck.line import Topic
from qmpd.hostcheck.remedies import installing
from qmpd.probe import ProbeProblem
from qmpd.throwaway import everything
from qmpd.views import CheckLine

EMULATORS: Final = Topic("Emulators")

#: Programs that only print something about themselves take some 20 ms; this is a hung one.
PRINT_LIMIT_S: Final = 10.0
#: More than any of them prints.
PRINT_LIMIT_BYTES: Final = 256 * 1024


async def printed(*argv: str) -> str | None:
    """What a program prints on its standard output until it closes it; None if it cannot be run or takes too long."""
    try:
        process = await asyncio.create_subprocess_exec(*argv, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, limit=PRINT_LIMIT_BYTES)
    except OSError:
        return None
    try:
        if process.stdout is None:
            return None
        async with asyncio.timeout(PRINT_LIMIT_S):
            output = await everything(process.stdout, PRINT_LIMIT_BYTES)
    except TimeoutError:
        return None
    else:
        return output.decode(errors="replace")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def data_dirs(emulators: Sequence[EmulatorFacts]) -> tuple[str, ...]:
    """Where the emulators look for firmware: asked of one per version and directory, since these share it."""
    asked = {(str(Path(emulator.path).parent), emulator.version): emulator.path for emulator in emulators}
    outputs = [await printed(path, "-L", "help") for path in asked.values()]
    return _distinct_paths("\n".join(output for output in outputs if output is not None))


def _distinct_paths(lines: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(map(os.path.normpath, lines.splitlines())))


def emulator_lines(found: Sequence[EmulatorFacts | ProbeProblem], host: str, family: str) -> list[CheckLine]:
    """The emulators by version and directory, those that do not work, and whether there is one for this host's own architecture."""
    working = [item for item in found if isinstance(item, EmulatorFacts)]
    lines = [
        EMULATORS.warned(Path(item.path).name, "does not answer", f"It cannot be used: {item.message}", "reinstall it, or take it off PATH")
        for item in found
        if isinstance(item, ProbeProblem)
    ]
    if not working:
        lines.append(EMULATORS.failed("emulators", "none", "No machine can run.", installing("all emulators", family)))
        return lines
    groups: dict[tuple[str, str], list[EmulatorFacts]] = {}
    for emulator in working:
        groups.setdefault((emulator.version, str(Path(emulator.path).parent)), []).append(emulator)
    lines = [_group_line(*key, members) for key, members in sorted(groups.items())] + lines
    native = NATIVE.get(host, ())
    if native and not any(emulator.target in native for emulator in working):
        meaning = "Only machines of foreign architectures can run, emulated."
        lines.append(EMULATORS.warned(f"emulator for {host}", "none", meaning, installing("all emulators", family)))
    return [*lines, *_sandbox_lines(working)]


def _group_line(version: str, directory: str, members: Sequence[EmulatorFacts]) -> CheckLine:
    targets = ", ".join(sorted(member.target for member in members))
    return EMULATORS.passed(f"QEMU {version}", f"{len(members)} in {directory}: {targets}", value=len(members))


def _sandbox_lines(working: Sequence[EmulatorFacts]) -> list[CheckLine]:
    open_ones = [Path(emulator.path).name for emulator in working if "sandbox" not in emulator.options]
    if not open_ones:
        return []
    meaning = "Their system calls are not filtered: what takes over such a QEMU can do all its user can."
    return [EMULATORS.warned("sandbox", f"not in {', '.join(open_ones)}", meaning, "use builds that were configured with --enable-seccomp")]


def image_formats(help_text: str) -> tuple[str, ...]:
    """The formats named by `qemu-img --help`."""
    found = re.search(r"^Supported (?:image )?formats:(.*(?:\n[ \t]+\S.*)*)", help_text, re.MULTILINE)
    return tuple(found[1].split()) if found else ()


def image_version(help_text: str) -> str:
    """The version in the first line of `qemu-img --help`."""
    found = re.match(r"qemu-img version (\S+)", help_text)
    return found[1] if found else "of an unknown version"


async def image_line(family: str) -> CheckLine:
    """Whether disk images can be made."""
    path = await asyncio.to_thread(shutil.which, "qemu-img")
    text = None if path is None else await printed(path, "--help")
    if path is None or text is None:
        found = "none" if path is None else f"{path} does not run"
        return EMULATORS.warned(
            "qemu-img", found, "New disk images cannot be made, nor existing ones converted.", installing("qemu-img", family)
        )
    # Most of the list are protocols and filters; these are what people keep disks in.
    kept = [name for name in ("raw", "qcow2", "vmdk", "vdi", "vhdx", "vpc", "qed") if name in image_formats(text)]
    return EMULATORS.passed("qemu-img", f"{image_version(text)}, formats {', '.join(kept)}")


async def tpm_line(family: str) -> CheckLine:
    """Whether machines can have a TPM; most need none."""
    path = await asyncio.to_thread(tpm.program)
    text = None if path is None else await printed(path, "--version")
    if path is None or text is None:
        found = "none" if path is None else f"{path} does not run"
        return EMULATORS.passed("swtpm", found, f"No machine can have a TPM: {installing('swtpm', family)}")
    version = re.search(r"version ([0-9][^ ,]*)", text)
    return EMULATORS.passed("swtpm", version[1] if version else "of an unknown version")
