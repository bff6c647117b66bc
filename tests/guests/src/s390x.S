/* s390x, the ASCII console of the service processor (SCLP). DELAY turns of a loop after every character of the rolling line.
   SERVC takes a command in %r1 and the address of a control block, which must not cross a page, in %r2. */
	.set WRITE_EVENT_MASK, 0x00780005
	.set WRITE_EVENT_DATA, 0x00760005
	.globl _start

_start:	larl %r2, mask_block
	iilf %r1, WRITE_EVENT_MASK
0:	.insn rre, 0xb2200000, %r1, %r2		/* SERVC */
	brc 2, 0b				/* busy: again */
	larl %r3, banner
	lhi %r6, 1				/* no delay for the banner */
emit:	llgc %r5, 0(%r3)
	aghi %r3, 1
	ltgr %r5, %r5
	jz end_of_text
	larl %r2, write_block
	stc %r5, character - write_block(%r2)
	mvi 6(%r2), 0				/* response code and event flags are QEMU's to set: clear them again */
	mvi 7(%r2), 0
	mvi 11(%r2), 0
	iilf %r1, WRITE_EVENT_DATA
full:	.insn rre, 0xb2200000, %r1, %r2		/* SERVC */
	brc 2, full				/* busy: again */
	lr %r4, %r6
pause:	brct %r4, pause
	j emit

end_of_text:
	larl %r3, number_end_at			/* count the number up: decimal digits, right to left while they overflow */
	lg %r3, 0(%r3)
carry:	aghi %r3, -1
	llgc %r5, 0(%r3)
	ahi %r5, 1
	stc %r5, 0(%r3)
	chi %r5, '9'
	jnh counted
	mvi 0(%r3), '0'
	j carry
counted:
	larl %r3, line_at
	lg %r3, 0(%r3)
	iilf %r6, DELAY
	j emit

	.balign 8				/* larl reaches even addresses only, these may be odd */
number_end_at:
	.quad number_end
line_at:
	.quad line

	.balign 256
mask_block:					/* length, function, control, response; mask length; four masks: the host's and the guest's */
	.short 28
	.byte 0, 0, 0, 0
	.short 0
	.short 0, 4
	.long 0, 0x00000040, 0, 0		/* 0x40: ASCII console data (event type 0x1a) */
	.balign 256
write_block:					/* length, function, control, response; event: length, type, flags, reserved, data */
	.short 15
	.byte 0, 0, 0, 0
	.short 0
	.short 7
	.byte 0x1a, 0
	.short 0
character:
	.byte 0
	.balign 2
	.include "pattern.inc"
