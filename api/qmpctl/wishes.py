"""What the options of `qmpctl run` ask for, as a machine definition."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import click
import msgspec

from qmpctl.documents import Tree, spec_of
from qmpd.spec import MachineSpec

#: Endings of image files that say what is in them. Anything else must be said: contents are never looked at.
FORMATS: Final = {".qcow2": "qcow2", ".img": "raw", ".raw": "raw", ".iso": "raw"}
_FORWARD: Final = re.compile(r"(?:(?P<address>[0-9.]+):)?(?P<host>\d+):(?P<guest>\d+)(?:/(?P<protocol>tcp|udp))?")
#: A comma ends the file name unless it is doubled, as in QEMU's own options.
_COMMA: Final = re.compile(r"(?<!,),(?!,)")


class Wishes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options, by their names, as they were given."""

    name: str | None = None
    kernel: str | None = None
    initrd: str | None = None
    append: str | None = None
    dtb: str | None = None
    bios: str | None = None
    disks: tuple[str, ...] = ()
    cdroms: tuple[str, ...] = ()
    memory: int | None = None
    cpus: int | None = None
    cpu: str | None = None
    nic: str | None = None
    forwards: tuple[str, ...] = ()
    rng: bool = False
    vnc: bool = False
    accel: str | None = None
    devices: tuple[str, ...] = ()


def spec_from(board: str, wishes: Wishes, name: str) -> MachineSpec:
    """The definition. Raises a usage error for options that cannot be understood or contradict each other, Invalid for wrong values."""
    here = Path.cwd()
    tree: Tree = {
        "name": name,
        "board": board,
        "accel": wishes.accel,
        "memory_mib": wishes.memory,
        "cpu": _present({"count": wishes.cpus, "model": wishes.cpu}),
        "firmware": _firmware(wishes.bios),
        "kernel": _kernel(wishes),
        "disks": [_disk(text) for text in wishes.disks] + [_cdrom(path) for path in wishes.cdroms],
        "nics": _nics(wishes),
        "rng": wishes.rng or None,
        "display": {"kind": "vnc"} if wishes.vnc else None,
        "devices": [_device(text) for text in wishes.devices],
    }
    return spec_of(_present(tree), here)


def _present(tree: Tree) -> Tree:
    return {key: value for key, value in tree.items() if value not in (None, [], {})}


def _kernel(wishes: Wishes) -> Tree | None:
    kernel = _present({"image": wishes.kernel, "initrd": wishes.initrd, "append": wishes.append, "dtb": wishes.dtb})
    if kernel and wishes.kernel is None:
        raise click.UsageError("--initrd, --append and --dtb belong to a --kernel, which was not given")
    return kernel or None


def _firmware(bios: str | None) -> Tree | None:
    if bios is None:
        return None
    return {"kind": "none"} if bios == "none" else {"kind": "bios", "path": bios}


def _nics(wishes: Wishes) -> list[Tree]:
    kind = wishes.nic or ("user" if wishes.forwards else None)
    if kind is None:
        return []
    if kind != "user" and wishes.forwards:
        raise click.UsageError("--forward needs --nic user")
    return [_present({"kind": kind, "forwards": [_forward(text) for text in wishes.forwards]})]


def _forward(text: str) -> Tree:
    found = _FORWARD.fullmatch(text)
    if found is None:
        raise click.UsageError(f"--forward {text!r} is not [ADDRESS:]HOST:GUEST[/udp]")
    return _present(
        {
            "host_address": found["address"],
            "host_port": int(found["host"]),
            "guest_port": int(found["guest"]),
            "protocol": found["protocol"],
        }
    )


def _disk(text: str) -> Tree:
    path, *settings = (part.replace(",,", ",") for part in _COMMA.split(text))
    disk: Tree = {"kind": "image", "path": path}
    for setting in settings:
        key, _, value = setting.partition("=")
        if setting == "ro":
            disk["read_only"] = True
        elif key in {"bus", "format"} and value:
            disk[key] = value
        else:
            raise click.UsageError(f"--disk {text!r}: {setting!r} is none of bus=…, format=…, ro (double a comma in a file name)")
    if "format" not in disk:
        ending = Path(path).suffix.lower()
        if ending not in FORMATS:
            raise click.UsageError(
                f"--disk {text!r}: say format=raw or format=qcow2; the name does not tell, and contents are not looked at"
            )
        disk["format"] = FORMATS[ending]
    return disk


def _cdrom(path: str) -> Tree:
    return {"kind": "image", "path": path, "format": "raw", "media": "cdrom", "read_only": True}


def _device(text: str) -> Tree:
    try:
        return msgspec.json.decode(text, type=Tree)
    except msgspec.DecodeError as error:
        raise click.UsageError(f"--device {text!r} is not a JSON object: {error}") from error
