/* RISC-V, 32 and 64 bit, in machine mode without firmware: the virt board, a 16550 at UART and the test device at TEST_DEVICE.

   Variants: QUIET, ECHO, RESET, POWEROFF; none of them: the rolling line, with DELAY turns of a loop after every character. */
	.set LINE_STATUS, 5
	.set TEST_DEVICE, 0x100000
	.option norelax
	.globl _start

_start:	csrr a0, mhartid			/* every hart starts here: only the first one goes on */
	beqz a0, first
asleep:	wfi
	j asleep
first:	li a1, UART
	la a0, banner
	li a3, 1				/* no delay for the banner */
emit:	lbu a2, 0(a0)
	addi a0, a0, 1
	beqz a2, end_of_text
full:	lbu a4, LINE_STATUS(a1)
	andi a4, a4, 0x20			/* transmitter empty */
	beqz a4, full
	sb a2, 0(a1)
	mv a4, a3
pause:	addi a4, a4, -1
	bnez a4, pause
	j emit

end_of_text:
.ifdef QUIET
	j asleep
.endif

.ifdef RESET
	li a4, TEST_DEVICE
	li a2, 0x7777
	sw a2, 0(a4)
	j asleep
.endif

.ifdef POWEROFF
	li a4, TEST_DEVICE
	li a2, 0x5555
	sw a2, 0(a4)
	j asleep
.endif

.ifdef ECHO
	lbu a4, LINE_STATUS(a1)
	andi a4, a4, 1				/* a byte has arrived */
	beqz a4, end_of_text
	lbu a2, 0(a1)
	addi a4, a2, -'a'
	sltiu a4, a4, 26
	slli a4, a4, 5
	sub a2, a2, a4
answer:	lbu a4, LINE_STATUS(a1)
	andi a4, a4, 0x20
	beqz a4, answer
	sb a2, 0(a1)
	j end_of_text
.endif

	la a0, number_end			/* count the number up: decimal digits, right to left while they overflow */
	li a5, '9'
carry:	addi a0, a0, -1
	lbu a2, 0(a0)
	addi a2, a2, 1
	sb a2, 0(a0)
	bleu a2, a5, counted
	li a2, '0'
	sb a2, 0(a0)
	j carry
counted:
	la a0, line
	li a3, DELAY
	j emit

	.include "pattern.inc"
