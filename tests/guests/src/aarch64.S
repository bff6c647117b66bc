/* AArch64 boards with a PL011 serial port at UART.

   Variants: QUIET, ECHO, RESET, POWEROFF (the last two through PSCI, which QEMU's virt board answers to HVC); none of them: the rolling
   line, with DELAY turns of a loop after every character. */
	.set DATA, 0
	.set FLAGS, 0x18
	.set RECEIVE_EMPTY_BIT, 4
	.set TRANSMIT_FULL_BIT, 5
	.globl _start

_start:	mrs x0, mpidr_el1			/* boards without PSCI start every core here: only the first one goes on */
	and x0, x0, #0xff
	cbz x0, first
asleep:	wfi
	b asleep
first:	ldr x1, =UART
	adr x0, banner
	mov x3, #1				/* no delay for the banner */
emit:	ldrb w2, [x0], #1
	cbz w2, end_of_text
full:	ldr w4, [x1, #FLAGS]
	tbnz w4, #TRANSMIT_FULL_BIT, full
	str w2, [x1, #DATA]
	mov x4, x3
pause:	subs x4, x4, #1
	b.ne pause
	b emit

end_of_text:
.ifdef QUIET
	b asleep
.endif

.ifdef RESET
	ldr w0, =0x84000009			/* SYSTEM_RESET */
	hvc #0
	b asleep
.endif

.ifdef POWEROFF
	ldr w0, =0x84000008			/* SYSTEM_OFF */
	hvc #0
	b asleep
.endif

.ifdef ECHO
	ldr w4, [x1, #FLAGS]
	tbnz w4, #RECEIVE_EMPTY_BIT, end_of_text
	ldr w2, [x1, #DATA]
	and w2, w2, #0xff
	sub w4, w2, #'a'
	cmp w4, #25
	b.hi answer
	sub w2, w2, #0x20
answer:	ldr w4, [x1, #FLAGS]
	tbnz w4, #TRANSMIT_FULL_BIT, answer
	str w2, [x1, #DATA]
	b end_of_text
.endif

	adr x0, number_end			/* count the number up: decimal digits, right to left while they overflow */
carry:	ldrb w2, [x0, #-1]!
	add w2, w2, #1
	strb w2, [x0]
	cmp w2, #'9'
	b.ls counted
	mov w2, #'0'
	strb w2, [x0]
	b carry
counted:
	adr x0, line
	ldr x3, =DELAY
	b emit
	.ltorg

	.include "pattern.inc"
