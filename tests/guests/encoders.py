"""Machine code without an assembler, for targets the distribution has no binutils for.

The program is the same for all of them, written once over nine operations (`Target`); a target says how each of them is encoded.
All three targets have 32-bit instructions. Constants always take two of them, so every label is known before anything is encoded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Literal, Protocol

from tests.guests.trace import DIGITS, LETTERS, LINE_END

WORD = 4
TEXT_ALIGNMENT = 16


class Register(IntEnum):
    """What the program keeps in registers; each target maps them to its own numbers by adding an offset."""

    UART = 0
    CHARACTER = 1
    POINTER = 2
    DELAY = 3
    SCRATCH = 4


class Target(Protocol):
    """How one instruction set encodes what the program needs. Distances are in bytes, from the instruction itself."""

    byte_order: Literal["big", "little"]
    origin: int
    uart: int
    elf_bits: Literal[32, 64]
    elf_machine: int
    elf_flags: int

    def constant(self, register: Register, value: int) -> tuple[int, int]: ...
    def load_byte(self, register: Register, address: Register, offset: int) -> int: ...
    def store_byte(self, register: Register, address: Register, offset: int) -> int: ...
    def write_uart(self) -> int: ...
    def add(self, register: Register, source: Register, value: int) -> int: ...
    def jump_if_zero(self, register: Register, distance: int) -> int: ...
    def jump_if_not_zero(self, register: Register, distance: int) -> int: ...
    def jump_if_negative(self, register: Register, distance: int) -> int: ...
    def jump(self, distance: int) -> int: ...


class MicroBlaze:
    """Big endian; UART Lite, which QEMU lets take a byte at any time (transmit FIFO at +4)."""

    byte_order: Literal["big", "little"] = "big"
    origin = 0x90000000
    uart = 0x84000000
    elf_bits: Literal[32, 64] = 32
    elf_machine = 189
    elf_flags = 0

    def constant(self, register: Register, value: int) -> tuple[int, int]:
        """IMM gives the next instruction's constant its upper half."""
        return self._immediate(0x2C, 0, 0, value >> 16), self._immediate(0x0C, self._number(register), 0, value)

    def load_byte(self, register: Register, address: Register, offset: int) -> int:
        return self._immediate(0x38, self._number(register), self._number(address), offset)

    def store_byte(self, register: Register, address: Register, offset: int) -> int:
        return self._immediate(0x3C, self._number(register), self._number(address), offset)

    def write_uart(self) -> int:
        """SWI: the port's registers are 32 bits wide."""
        return self._immediate(0x3E, self._number(Register.CHARACTER), self._number(Register.UART), 4)

    def add(self, register: Register, source: Register, value: int) -> int:
        return self._immediate(0x0C, self._number(register), self._number(source), value)

    def jump_if_zero(self, register: Register, distance: int) -> int:
        return self._immediate(0x2F, 0, self._number(register), distance)

    def jump_if_not_zero(self, register: Register, distance: int) -> int:
        return self._immediate(0x2F, 1, self._number(register), distance)

    def jump_if_negative(self, register: Register, distance: int) -> int:
        return self._immediate(0x2F, 2, self._number(register), distance)

    def jump(self, distance: int) -> int:
        return self._immediate(0x2E, 0, 0, distance)

    @staticmethod
    def _number(register: Register) -> int:
        return register + 3

    @staticmethod
    def _immediate(operation: int, destination: int, source: int, value: int) -> int:
        return operation << 26 | destination << 21 | source << 16 | value & 0xFFFF


class LoongArch64:
    """Little endian; a 16550, which QEMU lets take a byte at any time as long as its reader keeps up."""

    byte_order: Literal["big", "little"] = "little"
    origin = 0x200000
    uart = 0x1FE001E0
    elf_bits: Literal[32, 64] = 64
    elf_machine = 258
    elf_flags = 3

    def constant(self, register: Register, value: int) -> tuple[int, int]:
        """LU12I.W sets bits 12 to 31, ORI the rest."""
        number = self._number(register)
        return 0x14000000 | (value >> 12 & 0xFFFFF) << 5 | number, 0x03800000 | (value & 0xFFF) << 10 | number << 5 | number

    def load_byte(self, register: Register, address: Register, offset: int) -> int:
        return self._immediate(0x2A000000, register, address, offset)

    def store_byte(self, register: Register, address: Register, offset: int) -> int:
        return self._immediate(0x29000000, register, address, offset)

    def write_uart(self) -> int:
        return self.store_byte(Register.CHARACTER, Register.UART, 0)

    def add(self, register: Register, source: Register, value: int) -> int:
        return self._immediate(0x02C00000, register, source, value)

    def jump_if_zero(self, register: Register, distance: int) -> int:
        return self._far(0x40000000, self._number(register) << 5, distance)

    def jump_if_not_zero(self, register: Register, distance: int) -> int:
        return self._far(0x44000000, self._number(register) << 5, distance)

    def jump_if_negative(self, register: Register, distance: int) -> int:
        """BLT against the register that is always zero."""
        return 0x60000000 | (distance >> 2 & 0xFFFF) << 10 | self._number(register) << 5

    def jump(self, distance: int) -> int:
        return self._far(0x50000000, 0, distance)

    @staticmethod
    def _number(register: Register) -> int:
        return register + 12

    def _immediate(self, operation: int, register: Register, source: Register, value: int) -> int:
        return operation | (value & 0xFFF) << 10 | self._number(source) << 5 | self._number(register)

    @staticmethod
    def _far(operation: int, source: int, distance: int) -> int:
        """Words; the upper bits of the distance are at the right end."""
        words = distance >> 2
        return operation | (words & 0xFFFF) << 10 | source | words >> 16 & (0x1F if source else 0x3FF)


class Nios2:
    """Little endian; a 16550 with a register every 4 bytes, reached past the cache."""

    byte_order: Literal["big", "little"] = "little"
    origin = 0xC8000000
    uart = 0xF8001600
    elf_bits: Literal[32, 64] = 32
    elf_machine = 113
    elf_flags = 0

    def constant(self, register: Register, value: int) -> tuple[int, int]:
        number = self._number(register)
        return self._immediate(0x34, 0, number, value >> 16), self._immediate(0x14, number, number, value)

    def load_byte(self, register: Register, address: Register, offset: int) -> int:
        return self._immediate(0x03, self._number(address), self._number(register), offset)

    def store_byte(self, register: Register, address: Register, offset: int) -> int:
        return self._immediate(0x05, self._number(address), self._number(register), offset)

    def write_uart(self) -> int:
        """STWIO."""
        return self._immediate(0x35, self._number(Register.UART), self._number(Register.CHARACTER), 0)

    def add(self, register: Register, source: Register, value: int) -> int:
        return self._immediate(0x04, self._number(source), self._number(register), value)

    def jump_if_zero(self, register: Register, distance: int) -> int:
        return self._branch(0x26, register, distance)

    def jump_if_not_zero(self, register: Register, distance: int) -> int:
        return self._branch(0x1E, register, distance)

    def jump_if_negative(self, register: Register, distance: int) -> int:
        return self._branch(0x16, register, distance)

    def jump(self, distance: int) -> int:
        return self._immediate(0x06, 0, 0, distance - WORD)

    @staticmethod
    def _number(register: Register) -> int:
        return register + 3

    def _branch(self, operation: int, register: Register, distance: int) -> int:
        """Compares with the register that is always zero; counts from the next instruction."""
        return self._immediate(operation, self._number(register), 0, distance - WORD)

    @staticmethod
    def _immediate(operation: int, first: int, second: int, value: int) -> int:
        return first << 27 | second << 22 | (value & 0xFFFF) << 6 | operation


class Listing:
    """A program under construction: instructions that may name labels not seen yet, and the labels."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._instructions: list[Callable[[int, Mapping[str, int]], int]] = []
        self._labels: dict[str, int] = {}

    def label(self, name: str) -> None:
        """The next instruction has this name."""
        self._labels[name] = self._here()

    def instruction(self, word: int) -> None:
        """An instruction that names no label."""
        self._instructions.append(lambda _here, _labels: word)

    def branch(self, encode: Callable[[int], int], label: str) -> None:
        """An instruction made from the distance to a label."""
        self._instructions.append(lambda here, labels: encode(labels[label] - here))

    def address(self, register: Register, label: str) -> None:
        """The address of a label into a register."""
        self._instructions += [
            lambda _here, labels: self._target.constant(register, labels[label])[0],
            lambda _here, labels: self._target.constant(register, labels[label])[1],
        ]

    def constant(self, register: Register, value: int) -> None:
        """A number into a register."""
        for word in self._target.constant(register, value):
            self.instruction(word)

    def encode(self, texts: Mapping[str, bytes]) -> bytes:
        """The instructions, then the texts, each of them a label too."""
        length = len(self._instructions) * WORD
        code_bytes = -(-length // TEXT_ALIGNMENT) * TEXT_ALIGNMENT
        labels = dict(self._labels)
        data = bytearray()
        for name, text in texts.items():
            labels[name] = self._target.origin + code_bytes + len(data)
            data += text
        order = ">" if self._target.byte_order == "big" else "<"
        words = (encode(self._target.origin + at * WORD, labels) for at, encode in enumerate(self._instructions))
        return b"".join(struct.pack(f"{order}I", word) for word in words).ljust(code_bytes, b"\0") + bytes(data)

    def _here(self) -> int:
        return self._target.origin + len(self._instructions) * WORD


def program(target: Target, banner: bytes, delay: int) -> bytes:
    """The counting guest: the banner, then the line for ever, its number counted up in memory; `delay` turns of a loop per character."""
    listing = Listing(target)
    listing.constant(Register.UART, target.uart)
    listing.address(Register.POINTER, "banner")
    listing.constant(Register.DELAY, 1)
    listing.label("emit")
    listing.instruction(target.load_byte(Register.CHARACTER, Register.POINTER, 0))
    listing.instruction(target.add(Register.POINTER, Register.POINTER, 1))
    listing.branch(lambda distance: target.jump_if_zero(Register.CHARACTER, distance), "end of text")
    listing.instruction(target.write_uart())
    listing.instruction(target.add(Register.SCRATCH, Register.DELAY, 0))
    listing.label("pause")
    listing.instruction(target.add(Register.SCRATCH, Register.SCRATCH, -1))
    listing.branch(lambda distance: target.jump_if_not_zero(Register.SCRATCH, distance), "pause")
    listing.branch(target.jump, "emit")
    listing.label("end of text")
    listing.address(Register.POINTER, "number end")
    listing.label("carry")
    listing.instruction(target.add(Register.POINTER, Register.POINTER, -1))
    listing.instruction(target.load_byte(Register.CHARACTER, Register.POINTER, 0))
    listing.instruction(target.add(Register.CHARACTER, Register.CHARACTER, 1))
    listing.instruction(target.store_byte(Register.CHARACTER, Register.POINTER, 0))
    listing.instruction(target.add(Register.SCRATCH, Register.CHARACTER, -(ord("9") + 1)))
    listing.branch(lambda distance: target.jump_if_negative(Register.SCRATCH, distance), "counted")
    listing.constant(Register.CHARACTER, ord("0"))
    listing.instruction(target.store_byte(Register.CHARACTER, Register.POINTER, 0))
    listing.branch(target.jump, "carry")
    listing.label("counted")
    listing.address(Register.POINTER, "line")
    listing.constant(Register.DELAY, delay)
    listing.branch(target.jump, "emit")
    return listing.encode({"banner": banner + b"\0", "line": LETTERS, "number": b"0" * DIGITS, "number end": LINE_END + b"\0"})


def elf(target: Target, code: bytes) -> bytes:
    """An ELF executable of one segment, entered at its start."""
    offset = 0x1000
    wide = target.elf_bits == 64
    order = ">" if target.byte_order == "big" else "<"
    header_bytes, segment_bytes = (64, 56) if wide else (52, 32)
    executable, version, loadable, all_rights = 2, 1, 1, 7
    identity = b"\x7fELF" + bytes([2 if wide else 1, 2 if order == ">" else 1, version]) + bytes(9)
    header = struct.pack(
        order + ("HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH"),
        *(executable, target.elf_machine, version, target.origin, header_bytes, 0, target.elf_flags),
        *(header_bytes, segment_bytes, 1, 0, 0, 0),
    )
    if wide:
        layout, fields = "IIQQQQQQ", (loadable, all_rights, offset, target.origin, target.origin, len(code), len(code), offset)
    else:
        layout, fields = "IIIIIIII", (loadable, offset, target.origin, target.origin, len(code), len(code), all_rights, offset)
    return (identity + header + struct.pack(order + layout, *fields)).ljust(offset, b"\0") + code


TARGETS: dict[str, Target] = {"microblaze": MicroBlaze(), "loongarch64": LoongArch64(), "nios2": Nios2()}


def encoded(target: Literal["microblaze", "loongarch64", "nios2"], banner: bytes, delay: int) -> bytes:
    """The ELF file for QEMU's `-kernel`."""
    return elf(TARGETS[target], program(TARGETS[target], banner, delay))
