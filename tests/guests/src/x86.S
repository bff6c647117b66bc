/* x86 PC and microvm: serial port COM1, a 16550.

   One text, three forms. Real mode runs it with 32-bit operand prefixes, so the same lines serve all of them:
     (none)      boot sector, linked at 0x7c00
     MULTIBOOT   a 32-bit ELF with a multiboot header, for -kernel, linked at 1 MiB
     BIOS        64 KiB of ROM, linked at 0 and seen through segment 0xf000; never writes to memory
   Variants: QUIET, ECHO, RESET, POWEROFF; none of them: the rolling line, with DELAY turns of a loop after every character. */
	.set COM1, 0x3f8
	.set LINE_STATUS, COM1 + 5
	.globl _start

.ifdef MULTIBOOT
	.code32
	.balign 4
	.long 0x1badb002, 0, -0x1badb002	/* multiboot: magic, no wishes, checksum */
_start:	cli
.else
	.code16
_start:	cli
.ifdef BIOS
	movw $0xf000, %ax
.else
	xorw %ax, %ax
.endif
	movw %ax, %ds
.endif
	movl $banner, %esi
	movl $1, %ebx				/* no delay for the banner */
emit:	movb (%esi), %ah
	incl %esi
	testb %ah, %ah
	jz end_of_text
	movw $LINE_STATUS, %dx
full:	inb %dx, %al
	testb $0x20, %al			/* transmitter empty */
	jz full
	movb %ah, %al
	movw $COM1, %dx
	outb %al, %dx
	movl %ebx, %ecx
pause:	decl %ecx
	jnz pause
	jmp emit

end_of_text:
.ifdef QUIET
asleep:	hlt
	jmp asleep
.endif

.ifdef RESET
	movw $0xcf9, %dx			/* reset control register of PIIX3 and ICH9 */
	movb $6, %al
	outb %al, %dx
wait:	hlt
	jmp wait
.endif

.ifdef POWEROFF
	movw $0x604, %dx			/* PM1a control, where SeaBIOS puts it on pc and q35; SLP_EN with type 0 is S5 */
	movw $0x2000, %ax
	outw %ax, %dx
wait:	hlt
	jmp wait
.endif

.ifdef ECHO
	movw $LINE_STATUS, %dx
listen:	inb %dx, %al
	testb $1, %al				/* a byte has arrived */
	jz listen
	movw $COM1, %dx
	inb %dx, %al
	movb %al, %ah
	cmpb $'a', %ah
	jb answer
	cmpb $'z', %ah
	ja answer
	subb $0x20, %ah
answer:	movw $LINE_STATUS, %dx
busy:	inb %dx, %al
	testb $0x20, %al
	jz busy
	movw $COM1, %dx
	movb %ah, %al
	outb %al, %dx
	jmp end_of_text
.endif

	movl $number_end, %esi			/* count the number up: decimal digits, right to left while they overflow */
carry:	decl %esi
	incb (%esi)
	cmpb $'9', (%esi)
	jbe counted
	movb $'0', (%esi)
	jmp carry
counted:
	movl $line, %esi
	movl $DELAY, %ebx
	jmp emit

	.include "pattern.inc"

.ifdef BIOS
	.org 0xfff0				/* where the CPU starts */
	ljmp $0xf000, $_start
	.org 0x10000
.endif
.ifndef BIOS
.ifndef MULTIBOOT
	.org 510
	.word 0xaa55
.endif
.endif
