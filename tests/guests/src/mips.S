/* MIPS Malta, both byte orders; 64-bit CPUs run the same 32-bit ELF. A 16550 at UART, uncached.
   DELAY turns of a loop after every character of the rolling line. The instruction after a branch is in its delay slot. */
	.set LINE_STATUS, 5
	.set noreorder
	.globl _start

_start:	mfc0 $8, $16				/* from release 2 on (Config, field AR) a core knows its number */
	andi $8, $8, 0x1c00
	beqz $8, first
	nop
	mfc0 $8, $15, 1				/* every core starts here: only number 0 goes on */
	andi $8, $8, 0x3ff
	beqz $8, first
	nop
asleep:	wait
	b asleep
	nop
first:	li $4, UART
	la $5, banner
	li $7, 1				/* no delay for the banner */
emit:	lbu $6, 0($5)
	addiu $5, $5, 1
	beqz $6, end_of_text
	nop
full:	lbu $8, LINE_STATUS($4)
	andi $8, $8, 0x20			/* transmitter empty */
	beqz $8, full
	nop
	sb $6, 0($4)
	move $8, $7
pause:	addiu $8, $8, -1
	bnez $8, pause
	nop
	b emit
	nop

end_of_text:
	la $5, number_end			/* count the number up: decimal digits, right to left while they overflow */
carry:	addiu $5, $5, -1
	lbu $6, 0($5)
	addiu $6, $6, 1
	sb $6, 0($5)
	sltiu $8, $6, '9' + 1
	bnez $8, counted
	nop
	li $6, '0'
	b carry
	sb $6, 0($5)
counted:
	la $5, line
	li $7, DELAY
	b emit
	nop

	.include "pattern.inc"
