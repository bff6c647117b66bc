/* HP PA-RISC, B160L: the 16550 of the LASI chip at UART. DELAY turns of a loop after every character of the rolling line.
   The instruction after a branch is in its delay slot; bits count from the left. */
	.code
	.level 1.1
	.export _start

_start:	ldil L'UART, %r20
	ldo R'UART(%r20), %r20
	ldil L'banner, %r21
	ldo R'banner(%r21), %r21
	ldi 1, %r23				/* no delay for the banner */
emit:	ldb 0(%r21), %r22
	comib,= 0, %r22, end_of_text
	ldo 1(%r21), %r21
full:	ldb 5(%r20), %r24			/* line status */
	bb,>= %r24, 26, full			/* transmitter empty */
	nop
	stb %r22, 0(%r20)
	copy %r23, %r24
pause:	addib,<> -1, %r24, pause
	nop
	b,n emit

end_of_text:
	ldil L'number_end, %r21			/* count the number up: decimal digits, right to left while they overflow */
	ldo R'number_end(%r21), %r21
	ldi 57, %r25				/* '9' */
carry:	ldo -1(%r21), %r21
	ldb 0(%r21), %r22
	ldo 1(%r22), %r22
	stb %r22, 0(%r21)
	comb,<= %r22, %r25, counted
	ldi 48, %r22				/* '0' */
	b carry
	stb %r22, 0(%r21)
counted:
	ldil L'line, %r21
	ldo R'line(%r21), %r21
	ldil L'DELAY, %r23
	b emit
	ldo R'DELAY(%r23), %r23

	.include "pattern.inc"
