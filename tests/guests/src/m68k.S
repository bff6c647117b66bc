/* m68k boards. DELAY turns of a loop after every character of the rolling line. The serial port is one of
     GOLDFISH   virt: a 32-bit store to UART, taken at any time
     ESCC       q800: a Zilog SCC, control byte at UART, data 4 further on
     COLDFIRE   mcf5208evb: a ColdFire UART; only instructions a ColdFire has are used everywhere */
	.globl _start

_start:	move.l #UART, %a0
.ifdef ESCC
	move.b #5, (%a0)			/* write register 5: 8 bits, transmitter on */
	move.b #0x68, (%a0)
.endif
.ifdef COLDFIRE
	moveq #4, %d0
	move.b %d0, 8(%a0)			/* command: transmitter on */
.endif
	lea banner, %a1
	moveq #1, %d3				/* no delay for the banner */
emit:	clr.l %d0
	move.b (%a1)+, %d0
	jeq end_of_text
.ifdef GOLDFISH
	move.l %d0, (%a0)
.endif
.ifdef ESCC
full:	btst #2, (%a0)				/* read register 0: transmit buffer empty */
	jeq full
	move.b %d0, 4(%a0)
.endif
.ifdef COLDFIRE
full:	btst #2, 4(%a0)				/* status: transmitter ready */
	jeq full
	move.b %d0, 12(%a0)
.endif
	move.l %d3, %d1
pause:	subq.l #1, %d1
	jne pause
	jra emit

end_of_text:
	lea number_end, %a1			/* count the number up: decimal digits, right to left while they overflow */
	moveq #'9', %d2
carry:	clr.l %d0
	move.b -(%a1), %d0
	addq.l #1, %d0
	move.b %d0, (%a1)
	cmp.l %d2, %d0
	jls counted
	moveq #'0', %d0
	move.b %d0, (%a1)
	jra carry
counted:
	lea line, %a1
	move.l #DELAY, %d3
	jra emit

	.include "pattern.inc"
