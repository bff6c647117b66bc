/* 32-bit Arm boards with a PL011 serial port at UART. DELAY turns of a loop after every character of the rolling line.

   MANY_CORES: the board starts every core here; all but the first go to sleep. (Older cores have no such register to ask.) */
	.set DATA, 0
	.set FLAGS, 0x18
	.set TRANSMIT_FULL, 0x20
	.arm
	.globl _start

_start:
.ifdef MANY_CORES
	mrc p15, 0, r0, c0, c0, 5
	ands r0, r0, #0xff
	beq first
asleep:	wfi
	b asleep
first:
.endif
	ldr r1, =UART
	ldr r0, =banner
	mov r3, #1				/* no delay for the banner */
emit:	ldrb r2, [r0], #1
	cmp r2, #0
	beq end_of_text
full:	ldr r4, [r1, #FLAGS]
	tst r4, #TRANSMIT_FULL
	bne full
	str r2, [r1, #DATA]
	mov r4, r3
pause:	subs r4, r4, #1
	bne pause
	b emit

end_of_text:
	ldr r0, =number_end			/* count the number up: decimal digits, right to left while they overflow */
carry:	ldrb r2, [r0, #-1]!
	add r2, r2, #1
	strb r2, [r0]
	cmp r2, #'9'
	bls counted
	mov r2, #'0'
	strb r2, [r0]
	b carry
counted:
	ldr r0, =line
	ldr r3, =DELAY
	b emit
	.ltorg

	.include "pattern.inc"
