"""The machines the demo boots: boards with their proven guests, where these come from the distribution's packages and are on this host."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import msgspec

from qmpd.board import NamedBoard, ProvenGuest
from qmpd.spec import BiosFirmware, DefaultFirmware, Kernel, MachineSpec
from scripts.lib.demo_boards import INSTALLER

#: For a guest whose time nobody has measured: it begins before those that are known to be quick.
UNKNOWN_S: Final = 60.0
#: The first question of Debian's installer, measured with Debian 12's on aarch64-virt.
INSTALLER_APPEND: Final = "DEBIAN_FRONTEND=text priority=low"
INSTALLER_EXPECT: Final = "Choose the language|Select a language|Choose language"
INSTALLER_S: Final = 45.0


class Unusable(Exception):
    """Boards that were asked for cannot be shown, and why."""


class Showing(msgspec.Struct, frozen=True, kw_only=True):
    """A machine to boot, and what it has to print."""

    board: str
    arch: str
    guest: ProvenGuest
    spec: MachineSpec


Find = Callable[[str], str | None]


def newest(pattern: str) -> str | None:
    """The file a guest's path names; the last in order where the pattern fits several versions. None: there is none."""
    found = sorted(glob.glob(pattern))  # noqa: PTH207  # absolute patterns are no business of Path.glob
    return found[-1] if found else None


def chosen(boards: Iterable[NamedBoard], names: Sequence[str], find: Find = newest) -> tuple[Showing, ...]:
    """What to boot on the boards in `names`, slow guests first, as they end last.

    Raises:
        Unusable: a board does not exist, or has no guest on this host; all of them are named.
    """
    known = {board.id: board for board in boards}
    showings: list[Showing] = []
    reasons: list[str] = []
    for name in dict.fromkeys(names):
        try:
            showings.append(showing(known[name], find))
        except KeyError:
            reasons.append(f"there is no board {name}")
        except Unusable as reason:
            reasons.append(str(reason))
    if reasons:
        raise Unusable("; ".join(reasons))
    return tuple(sorted(showings, key=lambda each: each.guest.seconds or UNKNOWN_S, reverse=True))


def installer(shell: Showing) -> Showing:
    """The same machine with the installer as it starts by itself."""
    guest = msgspec.structs.replace(
        shell.guest,
        summary="the Debian 12 installer, at its first question",
        append=INSTALLER_APPEND,
        expect=INSTALLER_EXPECT,
        send=None,
        send_after=None,
        seconds=INSTALLER_S,
    )
    kernel = shell.spec.kernel and msgspec.structs.replace(shell.spec.kernel, append=INSTALLER_APPEND)
    spec = msgspec.structs.replace(shell.spec, name=f"{shell.spec.name}-installer", title=guest.summary, kernel=kernel)
    return msgspec.structs.replace(shell, guest=guest, spec=spec)


def default(boards: Iterable[NamedBoard], names: Sequence[str], find: Find = newest) -> tuple[Showing, ...]:
    """What to boot unless the user says otherwise: `names`, and an installer."""
    shown = chosen(boards, names, find)
    return (*(installer(each) for each in shown if each.board == INSTALLER), *shown)


def showing(board: NamedBoard, find: Find) -> Showing:
    """A board with its guest; raises Unusable where the guest does not come from a package, or is not there."""
    guest = board.board.guest
    if guest is None:
        raise Unusable(f"no guest is known for {board.id}")
    if guest.source is not None or not guest.packages:
        raise Unusable(f"the guest of {board.id} does not come from a package")
    files = {path: find(path) for path in (guest.bios, guest.kernel, guest.initrd, guest.dtb) if path is not None}
    absent = [path for path, file in files.items() if file is None]
    if absent:
        raise Unusable(f"{board.id} needs {', '.join(absent)} from {', '.join(guest.packages)}")

    def file(path: str | None) -> str | None:
        return None if path is None else files[path]

    image, bios = file(guest.kernel), file(guest.bios)
    spec = MachineSpec(
        name=board.id.replace("_", "-"),
        board=board.id,
        title=guest.summary,
        memory_mib=guest.memory_mib,
        machine_options=guest.machine_options,
        firmware=DefaultFirmware() if bios is None else BiosFirmware(path=bios),
        kernel=None if image is None else Kernel(image=image, initrd=file(guest.initrd), append=guest.append, dtb=file(guest.dtb)),
        devices=guest.devices,
    )
    return Showing(board=board.id, arch=board.board.arch, guest=guest, spec=spec)
