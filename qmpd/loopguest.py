"""The tiny guests whose running time tells how fast an accelerator is. Each computes for a moment, checks its sum and ends QEMU.

A guest that gets the sum wrong never ends, so that the time limit turns an accelerator that miscomputes into one that is too slow.
Multiplications feed memory accesses or shifts, and every turn makes an indirect call: what guests do, and what TCG is slow at. The
x86 guest also leaves to QEMU every 65,536 turns, so that an accelerator which never comes back from there is seen.

The sources stand above the bytes. They were assembled with GNU as (`--32` for x86; for riscv64 linked with `-Ttext=0`), then
`objcopy -O binary`. The aarch64 and riscv64 guests were run under TCG only; no KVM host of these architectures was at hand.
"""

from __future__ import annotations

from typing import Final

import msgspec


class LoopGuest(msgspec.Struct, frozen=True, kw_only=True):
    """A program for one target: the machines that can run it, first choice first, and how QEMU ends when it ran correctly.

    `machine_options` are appended to the machine's name. `options` have `{program}` for the path of the file that holds `image`.
    """

    target: str
    machines: tuple[str, ...]
    machine_options: str = ""
    options: tuple[str, ...]
    image: bytes
    exit_code: int


# Loaded by `-bios` at the last 64 KiB below 4 GiB, where x86 processors begin. After reset the caches are off (CR0.CD, CR0.NW).
#
#     .code16
#     start:
#       cli
#       lgdtl %cs:gdtr
#       movl %cr0, %eax
#       andl $0x9fffffff, %eax
#       orb $1, %al
#       movl %eax, %cr0
#       ljmpl $8, $0xffff0000 + flat
#     gdt:
#       .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
#     gdtr:
#       .word 23
#       .long 0xffff0000 + gdt
#     .code32
#     flat:
#       movw $16, %ax
#       movw %ax, %ds
#       movw %ax, %ss
#       movl $0x8000, %esp
#       movl $0x1000, %ebx
#       movl $0xffff0000 + turn, %ebp
#       movl $4000000, %ecx
#       xorl %eax, %eax
#       xorl %esi, %esi
#     loop:
#       imull $1664525, %eax, %eax
#       addl $1013904223, %eax
#       movl %eax, %edx
#       shrl $20, %edx
#       movl %eax, (%ebx, %edx, 4)
#       xorl $0x5a5, %edx
#       addl (%ebx, %edx, 4), %esi
#       call *%ebp
#       testl $0xffff, %ecx
#       jnz next
#       outb %al, $0x80
#     next:
#       decl %ecx  /* a turn less */
#       jnz loop
#       cmpl $0x8c55fca5, %esi
#     wrong:
#       jne wrong
#       movb $0x2a, %al
#       outb %al, $0xf4
#     halt:
#       hlt
#       jmp halt
#     turn:
#       roll $3, %esi
#       ret
_X86: Final = bytes.fromhex(
    "fa2e660f011636000f20c06625ffffff9f0c010f22c066ea3c00ffff08000000000000000000ffff0000009bcf00ffff0000"
    "0093cf0017001e00ffff66b810008ed88ed0bc00800000bb00100000bd9600ffffb900093d0031c031f669c00d661900055f"
    "f36e3c89c2c1ea1489049381f2a5050000033493ffd5f7c1ffff00007502e6804975d581fea5fc558c75feb02ae6f4f4ebfd"
    "c1c603c3"
)
_BIOS_BYTES: Final = 0x10000
_RESET_VECTOR: Final = 0xFFF0
#: `jmp start`, relative to the end of the instruction and modulo 64 KiB.
_RESET_JUMP: Final = b"\xe9" + (_BIOS_BYTES - _RESET_VECTOR - 3).to_bytes(2, "little")
_X86_BIOS: Final = (_X86.ljust(_RESET_VECTOR, b"\0") + _RESET_JUMP).ljust(_BIOS_BYTES, b"\0")

# Loaded by `-kernel` as a raw image. The instruction cache is switched on (SCTLR_EL1.I): without it, and with the MMU off, KVM would
# fetch every instruction from memory, which TCG does not. Data accesses are avoided for the same reason. Ends with PSCI SYSTEM_OFF.
#
#       mrs x5, sctlr_el1
#       orr x5, x5, #0x1000
#       msr sctlr_el1, x5
#       isb
#       mov w0, wzr
#       mov w6, wzr
#       ldr w1, =8000000
#       ldr w2, =1664525
#       ldr w3, =1013904223
#       ldr w4, =0xa0f5cba9
#       adr x7, turn
#     loop:
#       madd w0, w0, w2, w3
#       add w6, w6, w0
#       blr x7
#       subs w1, w1, #1
#       b.ne loop
#       cmp w6, w4
#     wrong:
#       b.ne wrong
#       ldr w0, =0x84000008
#       hvc #0
#     halt:
#       b halt
#     turn:
#       ror w6, w6, #29
#       ret
_AARCH64: Final = bytes.fromhex(
    "051038d5a50074b2051018d5df3f03d5e0031f2ae6031f2a2102001822020018230200182402001867010010000c021bc600"
    "000be0003fd62104007181ffff54df00046b0100005420010018020000d400000014c6748613c0035fd600127a000d661900"
    "5ff36e3ca9cbf5a008000084"
)

# Loaded by `-kernel` at the start of RAM, in machine mode under TCG and in supervisor mode under KVM. Ends through the test device.
#
#     .option norvc
#     .option norelax
#       li a0, 0
#       li a1, 8000000
#       li a2, 1664525
#       li a3, 1013904223
#       li a4, 0x6364b3f4
#       sext.w a4, a4
#       li a5, 0
#       la a6, turn
#     loop:
#       mulw a0, a0, a2
#       addw a0, a0, a3
#       slliw a5, a5, 3
#       addw a5, a5, a0
#       jalr a6
#       addi a1, a1, -1
#       bnez a1, loop
#     wrong:
#       bne a5, a4, wrong
#       li a5, 0x100000
#       li a6, 0x5555
#       sw a6, 0(a5)
#     halt:
#       j halt
#     turn:
#       srliw a7, a5, 5
#       xor a5, a5, a7
#       ret
_RISCV64: Final = bytes.fromhex(
    "13050000b7157a009b850520376619001b06d660b7f66e3c9b86f63537b764631b07473f1b07070093070000170800001308"
    "c8033b05c5023b05d5009b973700bb87a700e70008009385f5ffe39405fe6390e700b7071000375800001b08585523a00701"
    "6f0000009bd85700b3c7170167800000"
)

#: What the x86 guest writes to the debug port, as the exit code QEMU makes of it.
_DEBUG_EXIT: Final = (0x2A << 1) | 1

_X86_MACHINES: Final = ("q35", "pc", "microvm")
#: KVM has no default: it offers the version of the host's own interrupt controller.
_ARM_GIC: Final = ",gic-version=max"
_ARM_OPTIONS: Final = ("-cpu", "max", "-m", "64", "-kernel", "{program}")
_RISCV_OPTIONS: Final = ("-m", "64", "-bios", "none", "-kernel", "{program}")
_X86_OPTIONS: Final = ("-m", "16", "-bios", "{program}", "-device", "isa-debug-exit,iobase=0xf4,iosize=4")

_GUESTS: Final = (
    LoopGuest(target="x86_64", machines=_X86_MACHINES, options=_X86_OPTIONS, image=_X86_BIOS, exit_code=_DEBUG_EXIT),
    LoopGuest(target="i386", machines=_X86_MACHINES, options=_X86_OPTIONS, image=_X86_BIOS, exit_code=_DEBUG_EXIT),
    LoopGuest(target="aarch64", machines=("virt",), machine_options=_ARM_GIC, options=_ARM_OPTIONS, image=_AARCH64, exit_code=0),
    LoopGuest(target="riscv64", machines=("virt",), options=_RISCV_OPTIONS, image=_RISCV64, exit_code=0),
)

#: By QEMU's name of the target.
LOOP_GUESTS: Final = {guest.target: guest for guest in _GUESTS}
