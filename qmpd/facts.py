"""What was probed of the host and its emulators: the facts `plan` is given, and never looks up itself."""

from __future__ import annotations

import re
from typing import Literal

import msgspec


def version_numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a QEMU's version, or as many as there are: for what no schema tells, and for nothing else."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the fact types."""


class MachineType(Facts, frozen=True, kw_only=True):
    """One entry of `query-machines`."""

    name: str
    alias: str | None = None
    cpu_max: int = 1
    default_cpu: str | None = None
    default_ram_id: str | None = None
    deprecated: bool = False


class EmulatorFacts(Facts, frozen=True, kw_only=True):
    """One emulator binary, as it described itself over QMP with `-machine none`.

    `commands` are the QMP command names; `features` are schema paths such as `screendump.format` that qmpd asks for;
    `options` are the names of `query-command-line-options`; `cpus` is empty where the binary cannot tell.
    """

    path: str
    target: str
    version: str
    machines: tuple[MachineType, ...]
    cpus: tuple[str, ...] = ()
    devices: frozenset[str] = frozenset()
    commands: frozenset[str] = frozenset()
    features: frozenset[str] = frozenset()
    options: frozenset[str] = frozenset()
    accelerators: frozenset[str] = frozenset({"tcg"})

    @property
    def major_version(self) -> int:
        """The first number of the version: for what no schema tells, and for nothing else."""
        return int(self.version.partition(".")[0])

    def machine(self, name: str) -> MachineType | None:
        """The machine type of this name or alias."""
        for candidate in self.machines:
            if name in (candidate.name, candidate.alias):
                return candidate
        return None


class AcceleratorFacts(Facts, frozen=True, kw_only=True):
    """The measured verdict on KVM for one emulator: `usable` is what `accel = "auto"` follows.

    `ratio` is the speed of the same guest loop under KVM divided by that under TCG (None: KVM could not be tried).
    """

    usable: bool
    reason: str
    ratio: float | None = None


class FileFacts(Facts, frozen=True, kw_only=True):
    """What a path leads to. `magic` names a recognised image header (`qcow2`, `vmdk`, …), whatever the caller says it is. `backing` is the
    file that an image says it was made upon, where that is all that `refusal` is about: a definition that names it may use the image."""

    kind: Literal["file", "directory", "missing", "special", "denied"]
    size: int = 0
    readable: bool = False
    writable: bool = False
    real_path: str = ""
    magic: str | None = None
    refusal: str | None = None
    backing: str | None = None


class MachinePaths(Facts, frozen=True, kw_only=True):
    """Where one machine's files are: `run` for sockets and the launch record (0700, gone after a reboot), `state` for the rest.

    `beside`: they are those of a QEMU that is to take the place of one that lives, and has its TPM's state open.
    """

    run: str
    state: str
    beside: bool = False

    def socket(self, name: str) -> str:
        """The path of the listening socket called `name`."""
        return f"{self.run}/{name}.sock"

    def log(self, name: str) -> str:
        """The path of the log called `name`."""
        return f"{self.state}/{name}.log"

    def said(self, *, tpm: bool) -> tuple[str, ...]:
        """The paths of the logs of what QEMU prints, and its TPM if it has one."""
        return (self.log("stderr"), self.log("tpm")) if tpm else (self.log("stderr"),)

    def disk(self, index: int, image_format: str) -> str:
        """The path of the machine's own disk number `index`."""
        return f"{self.state}/disk{index}.{image_format}"

    @property
    def variables(self) -> str:
        """The path of the machine's copy of the firmware variables."""
        return f"{self.state}/firmware-vars.fd"

    @property
    def tpm(self) -> str:
        """The directory of the TPM's state."""
        return f"{self.state}/tpm-next" if self.beside else f"{self.state}/tpm"


class Confinement(Facts, frozen=True, kw_only=True):
    """How this daemon can hold a machine to limits.

    `way` is a `scope` of the manager of systemd on the bus at `place`, or a `cgroup` of its own below the directory `place`, or None:
    then `obstacle` says why and `mend` what to do. `controllers` are the kernel's that are there.
    """

    way: Literal["scope", "cgroup"] | None = None
    place: str = ""
    controllers: frozenset[str] = frozenset()
    obstacle: str = ""
    mend: str = ""


class World(Facts, frozen=True, kw_only=True):
    """Everything `problems` and `plan` may know beside the definition and the board.

    One emulator, the verdict on KVM, what the paths of the definition lead to, where the machine's own files are, whether
    `extra_args` are allowed here, how machines can be held to limits (looked at only for a definition that has some), and where swtpm
    is (looked for only for a definition with a TPM).
    """

    emulator: EmulatorFacts
    host_arch: str
    kvm: AcceleratorFacts
    paths: MachinePaths
    files: dict[str, FileFacts] = {}
    raw_options: bool = True
    confinement: Confinement = Confinement()
    swtpm: str | None = None
