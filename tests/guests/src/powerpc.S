/* PowerPC. DELAY turns of a loop after every character of the rolling line.
     PSERIES   64 bit, in place of the firmware: starts at 0x100; the terminal is the hypervisor's, by a call
     (none)    32 bit BookE boards with a 16550 at UART */
	.set H_PUT_TERM_CHAR, 0x58
	.set TERMINAL, 0x7100			/* unit address 0x71000000, upper half: the first spapr-vty */
	.set LINE_STATUS, 5
	.globl _start

.ifdef PSERIES
	.org 0x100
.endif
_start:	lis 19, banner@h
	ori 19, 19, banner@l
.ifndef PSERIES
	lis 18, UART@h
	ori 18, 18, UART@l
.endif
	li 21, 1				/* no delay for the banner */
emit:	lbz 23, 0(19)
	addi 19, 19, 1
	cmpwi 23, 0
	beq end_of_text
full:
.ifdef PSERIES
	li 3, H_PUT_TERM_CHAR
	lis 4, TERMINAL
	li 5, 1					/* one byte, at the left end of r6 */
	sldi 6, 23, 56
	li 7, 0
	sc 1
	cmpdi 3, 0				/* busy: again */
	bne full
.else
	lbz 3, LINE_STATUS(18)
	andi. 3, 3, 0x20			/* transmitter empty */
	beq full
	stb 23, 0(18)
.endif
	mtctr 21
pause:	bdnz pause
	b emit

end_of_text:
	lis 19, number_end@h			/* count the number up: decimal digits, right to left while they overflow */
	ori 19, 19, number_end@l
carry:	lbzu 23, -1(19)
	addi 23, 23, 1
	stb 23, 0(19)
	cmpwi 23, '9'
	ble counted
	li 23, '0'
	stb 23, 0(19)
	b carry
counted:
	lis 19, line@h
	ori 19, 19, line@l
	lis 21, DELAY@h
	ori 21, 21, DELAY@l
	b emit

	.include "pattern.inc"
