"""Emulators that keep a diary: the installed ones behind a script that gives every machine one monitor more, which writes to a file.

What QEMU says there has QEMU's own times, is whole from the first moment on, and needs nobody who listens: whoever wants to know when a
guest ran reads it, and need not ask a daemon. A machine is known by its `-uuid`; an emulator that is started without one (to be asked
what it can do) is left as it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Final

from tests.conftest import ROOT

PREFIX: Final = "qemu-system-"
#: Of the monitor, in QEMU.
CHARDEV: Final = "diary"
#: First the state at the beginning, then who the processors are; events follow for as long as QEMU lives.
OPENING: Final = ("qmp_capabilities", "query-status", "query-cpus-fast")

SCRIPT: Final = """\
#!/bin/sh
set -eu
umask 077
previous= uuid=
for word in "$@"; do
    [ "$previous" != -uuid ] || uuid=$word
    previous=$word
done
[ -n "$uuid" ] || exec {real} "$@"
diary={pages}/$uuid.$$
mkfifo "$diary.in"
: >"$diary.out"
# What is said to QEMU waits in the FIFO, which somebody has to hold open until QEMU does; a descriptor that was passed on is not ours.
for number in 9 8 7 6 5 4 3; do
    [ -e "/proc/$$/fd/$number" ] || break
done
eval "exec $number<>\\"\\$diary.in\\""
printf '{opening}' >"$diary.in"
exec {real} "$@" -chardev pipe,id={chardev},path="$diary" -mon chardev={chardev},mode=control
"""


class Emulators:
    """The directory of the scripts, for a daemon's setting `emulators`, and that of the diaries."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "bin"
        self.pages = directory / "pages"

    def program(self, arch: str) -> str:
        """The script for an architecture."""
        return str(self.directory / f"{PREFIX}{arch}")


def emulators() -> Emulators:
    """The scripts of all emulators on PATH. They are written once, so that what a daemon found out about them stays true."""
    found = _found()
    key = hashlib.sha256("\n".join(sorted(found.values())).encode() + SCRIPT.encode()).hexdigest()[:16]
    made = Emulators(ROOT / ".cache" / "diaries" / key)
    made.directory.mkdir(parents=True, exist_ok=True)
    made.pages.mkdir(exist_ok=True)
    opening = "".join(f'{{"execute":"{command}"}}' for command in OPENING)
    for name, real in found.items():
        path = made.directory / name
        if not path.exists():
            draft = path.with_suffix(f".{os.getpid()}")
            draft.write_text(SCRIPT.format(real=real, pages=made.pages, opening=opening, chardev=CHARDEV))
            draft.chmod(0o755)
            draft.replace(path)
    return made


def without_diary(words: tuple[str, ...]) -> tuple[str, ...]:
    """A running emulator's command line as it was before the script added to it."""
    end = next((at for at, word in enumerate(words) if word.startswith(f"pipe,id={CHARDEV},")), len(words) + 1)
    return words[: end - 1]


def _found() -> dict[str, str]:
    """Every emulator on PATH: the first of a name."""
    found: dict[str, str] = {}
    for directory in os.environ.get("PATH", os.defpath).split(os.pathsep):
        for path in sorted(Path(directory).glob(f"{PREFIX}*")):
            if path.name not in found and shutil.which(path.name) == str(path):
                found[path.name] = str(path)
    return found
