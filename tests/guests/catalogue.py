"""The catalogue of test guests, read from `guests.toml`: who runs what, and how it is made.

`Guest` is what the users of this package see; the rest says how `tests.guests.build` makes its file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

How = Literal["kernel", "bios", "disk", "floppy"]
Variant = Literal["count", "flood", "reset", "poweroff", "echo", "quiet", "blocks", "tpm"]

SOURCE_DIRECTORY = Path(__file__).parent / "src"
_CATALOGUE_FILE = Path(__file__).parent / "guests.toml"


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Guest(_Table, frozen=True, kw_only=True):
    """A guest that can be booted: the board it is for, the file, and what else the command line needs.

    `arch_emulator` is what follows `qemu-system-`. `serial_index` is the serial port it prints on. `options` are further arguments.
    """

    name: str
    board: str
    variant: Variant
    arch_emulator: str
    machine: str
    how: How
    file: Path
    cpu: str | None
    memory_mib: int
    options: tuple[str, ...]
    serial_index: int

    @property
    def banner(self) -> str:
        """The first line the guest prints, without its line end."""
        return f"BM-OK {self.name}"


class Toolchain(_Table, frozen=True, kw_only=True):
    """Cross binutils: the Debian package, the prefix of its tools, and the options that select the CPU."""

    package: str
    prefix: str
    assembler: tuple[str, ...] = ()
    linker: tuple[str, ...] = ()


class Assembled(_Table, frozen=True, kw_only=True, tag_field="made_by", tag="assembler"):
    """Made from a file in `src/`, linked at `address`: an ELF file, or the bytes alone."""

    toolchain: str
    source: str
    address: str
    form: Literal["elf", "bytes"] = "elf"
    symbols: dict[str, int]


class Encoded(_Table, frozen=True, kw_only=True, tag_field="made_by", tag="encoder"):
    """Made by `tests.guests.encoders`, where the distribution has no assembler."""

    target: Literal["microblaze", "loongarch64", "nios2"]
    symbols: dict[str, int]


Program = Assembled | Encoded


class BoardVariant(_Table, frozen=True, kw_only=True):
    """What a variant has in place of the board's own guest; its symbols are added."""

    how: How | None = None
    program: str | None = None
    symbols: dict[str, int] = {}


class GuestBoard(_Table, frozen=True, kw_only=True):
    """A machine type, with the least that QEMU wants to hear about it, and the guests for it."""

    emulator: str
    machine: str
    cpu: str | None = None
    memory_mib: int
    options: tuple[str, ...] = ()
    serial_index: int = 0
    how: How
    program: str
    variants: dict[Variant, BoardVariant] = {}


class Catalogue(_Table, frozen=True, kw_only=True):
    """The whole file."""

    toolchains: dict[str, Toolchain]
    programs: dict[str, Program]
    boards: dict[str, GuestBoard]


class Recipe(_Table, frozen=True, kw_only=True):
    """One guest, whose `file` is still a bare name, and the program it is made from, with all of its symbols."""

    guest: Guest
    program: Program


def load() -> Catalogue:
    """Read the catalogue.

    Raises:
        msgspec.ValidationError: the file does not say what it must.
    """
    return msgspec.toml.decode(_CATALOGUE_FILE.read_bytes(), type=Catalogue)


def recipes(catalogue: Catalogue) -> tuple[Recipe, ...]:
    """Every guest of the catalogue: per board its own, then its variants."""
    return tuple(
        _recipe(catalogue, identifier, variant, changes)
        for identifier, board in catalogue.boards.items()
        for variant, changes in (("count", BoardVariant()), *board.variants.items())
    )


def _recipe(catalogue: Catalogue, identifier: str, variant: Variant, changes: BoardVariant) -> Recipe:
    board = catalogue.boards[identifier]
    program = catalogue.programs[changes.program or board.program]
    name = identifier if variant == "count" else f"{identifier}-{variant}"
    how = changes.how or board.how
    guest = Guest(
        name=name,
        board=identifier,
        variant=variant,
        arch_emulator=board.emulator,
        machine=board.machine,
        how=how,
        file=Path(f"{name}.{_suffix(how, program)}"),
        cpu=board.cpu,
        memory_mib=board.memory_mib,
        options=board.options,
        serial_index=board.serial_index,
    )
    return Recipe(guest=guest, program=msgspec.structs.replace(program, symbols={**program.symbols, **changes.symbols}))


def _suffix(how: How, program: Program) -> str:
    if how in {"disk", "floppy"}:
        return "img"
    return "bin" if isinstance(program, Assembled) and program.form == "bytes" else "elf"
