/* 32-bit SPARC, SS-5, in place of its PROM. DELAY turns of a loop after every character of the rolling line.

   After reset the CPU fetches from the PROM at address 0, whatever the address says; loads and stores go to RAM. So the text is copied to
   RAM first, to the address it is linked at, out of the PROM's physical address. It has a page of its own: QEMU keeps one translation per
   page, so in the page of the code a store would bring RAM in the way of the next fetch. ASI 0x20 is a physical access, past the MMU.
   The instruction after a branch is in its delay slot. */
	.set PROM, 0x70000000
	.set SCC_CONTROL, 0x71100004		/* Zilog SCC, first port; data two further on */
	.set PHYSICAL, 0x20
	.globl _start

_start:	set SCC_CONTROL, %o1
	mov 5, %o2				/* write register 5: 8 bits, transmitter on */
	stba %o2, [%o1] PHYSICAL
	mov 0x68, %o2
	stba %o2, [%o1] PHYSICAL
	set text, %o0
	set text_end, %o3
	set PROM, %o4
copy:	add %o0, %o4, %o5
	lduba [%o5] PHYSICAL, %o2
	stb %o2, [%o0]
	inc %o0
	cmp %o0, %o3
	bne copy
	nop
	set banner, %o0
	mov 1, %o3				/* no delay for the banner */
	add %o1, 2, %o4
emit:	ldub [%o0], %o2
	tst %o2
	be end_of_text
	inc %o0
full:	lduba [%o1] PHYSICAL, %o5		/* read register 0: transmit buffer empty */
	andcc %o5, 4, %g0
	be full
	nop
	stba %o2, [%o4] PHYSICAL
	mov %o3, %o5
pause:	subcc %o5, 1, %o5
	bne pause
	nop
	ba emit
	nop

end_of_text:
	set number_end, %o0			/* count the number up: decimal digits, right to left while they overflow */
carry:	dec %o0
	ldub [%o0], %o2
	inc %o2
	stb %o2, [%o0]
	cmp %o2, '9'
	bleu counted
	mov '0', %o2
	ba carry
	stb %o2, [%o0]
counted:
	set line, %o0
	set DELAY, %o3
	ba emit
	nop

	.balign 4096
text:
	.include "pattern.inc"
text_end:
