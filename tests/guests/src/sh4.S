/* SuperH, the r2d board: SCIF, data register at UART, which QEMU lets take a byte at any time.
   DELAY turns of a loop after every character of the rolling line. The instruction after a branch is in its delay slot. */
	.globl _start

_start:	mov.l uart, r1
	mov.l banner_at, r4
	mov #1, r3				/* no delay for the banner */
emit:	mov.b @r4+, r2
	tst r2, r2
	bt end_of_text
	mov.b r2, @r1
	mov r3, r5
pause:	dt r5
	bf pause
	bra emit
	nop

end_of_text:
	mov.l number_end_at, r4			/* count the number up: decimal digits, right to left while they overflow */
	mov #'9', r6
carry:	add #-1, r4
	mov.b @r4, r2
	add #1, r2
	mov.b r2, @r4
	cmp/gt r6, r2
	bf counted
	mov #'0', r2
	bra carry
	mov.b r2, @r4
counted:
	mov.l line_at, r4
	mov.l delay, r3
	bra emit
	nop

	.balign 4
uart:	.long UART
delay:	.long DELAY
banner_at:
	.long banner
line_at:
	.long line
number_end_at:
	.long number_end

	.include "pattern.inc"
