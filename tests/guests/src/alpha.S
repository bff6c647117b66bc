/* Alpha, the clipper board: the 16550 of its ISA bridge. DELAY turns of a loop after every character of the rolling line.
   Addresses are counted from the program counter ($27); the serial port is at 0xfffffd01fc0003f8. */
	.set noat
	.set noreorder
	.globl _start

_start:	br $27, here
here:	lda $2, -0x2ff($31)			/* 0xfffffd01 << 32 */
	sll $2, 32, $2
	lda $1, 0x3f0($31)			/* 0x3f0 << 22 = 0xfc000000 */
	sll $1, 22, $1
	addq $2, $1, $2
	lda $2, 0x3f8($2)
	lda $3, banner - here($27)
	lda $7, 1($31)				/* no delay for the banner */
emit:	ldbu $4, 0($3)
	lda $3, 1($3)
	beq $4, end_of_text
full:	ldbu $5, 5($2)				/* line status */
	and $5, 0x20, $5			/* transmitter empty */
	beq $5, full
	stb $4, 0($2)
	mov $7, $5
pause:	subq $5, 1, $5
	bne $5, pause
	br $31, emit

end_of_text:
	lda $3, number_end - here($27)		/* count the number up: decimal digits, right to left while they overflow */
carry:	lda $3, -1($3)
	ldbu $4, 0($3)
	addq $4, 1, $4
	stb $4, 0($3)
	cmpule $4, 57, $5			/* '9' */
	bne $5, counted
	lda $4, 48($31)				/* '0' */
	stb $4, 0($3)
	br $31, carry
counted:
	lda $3, line - here($27)
	ldah $7, (DELAY + 0x8000) >> 16($31)	/* lda adds a signed half */
	lda $7, ((DELAY & 0xffff) ^ 0x8000) - 0x8000($7)
	br $31, emit

	.include "pattern.inc"
