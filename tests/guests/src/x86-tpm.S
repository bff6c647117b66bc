/* x86 PC with a TPM 2.0 (command response buffer): a 32-bit ELF with a multiboot header, for -kernel, linked at 1 MiB; prints on COM1.

   Extends PCR 10 once, and then says for ever what is in it:
     TPM rc=<response code> pcr=<the first eight bytes of PCR 10> resets=<how often the TPM was reset, which it keeps itself>
   or "TPM none" if there is none. DELAY turns of a loop between two lines. */
	.set COM1, 0x3f8
	.set LINE_STATUS, COM1 + 5
	.set TPM, 0xfed40000			/* locality 0 */
	.set LOC_CTRL, TPM + 0x08
	.set LOC_STS, TPM + 0x0c
	.set INTF_ID, TPM + 0x30
	.set CTRL_REQ, TPM + 0x40
	.set CTRL_START, TPM + 0x4c
	.set BUFFER, TPM + 0x80
	.set STACK, 0x90000
	.globl _start

	.code32
	.balign 4
	.long 0x1badb002, 0, -0x1badb002	/* multiboot: magic, no wishes, checksum */
_start:	cli
	cld
	movl $STACK, %esp
	movl $banner, %esi
	call print
	movl INTF_ID, %eax
	andl $0xf, %eax
	cmpl $1, %eax				/* a command response buffer */
	je present
	movl $none, %esi
	call print
asleep:	hlt
	jmp asleep

present:
	movl $1, LOC_CTRL			/* ask for the locality */
granted:
	testl $1, LOC_STS
	jz granted
	movl $1, CTRL_REQ			/* get ready for commands */
	movl $startup, %esi
	movl $startup_end - startup, %ecx
	call run				/* refused where the firmware has done it: that is fine */
	movl $extend, %esi
	movl $extend_end - extend, %ecx
	call run

again:	movl $clock, %esi
	movl $clock_end - clock, %ecx
	call run
	movl BUFFER + 26, %eax
	movl %eax, resets
	movl $pcr, %esi
	movl $pcr_end - pcr, %ecx
	call run
	movl $said_rc, %esi
	call print
	movl $BUFFER + 6, %esi
	movl $4, %ecx
	call hex
	movl $said_pcr, %esi
	call print
	movl $BUFFER + 30, %esi
	movl $8, %ecx
	call hex
	movl $said_resets, %esi
	call print
	movl $resets, %esi
	movl $4, %ecx
	call hex
	movl $end, %esi
	call print
	movl $DELAY, %ecx
pause:	decl %ecx
	jnz pause
	jmp again

run:	movl $BUFFER, %edi			/* the command at %esi, %ecx bytes of it; the answer is in the buffer then */
	rep movsb
	movl $1, CTRL_START
busy:	testl $1, CTRL_START
	jnz busy
	ret

hex:	movb (%esi), %bl			/* %ecx bytes at %esi */
	movb %bl, %al
	shrb $4, %al
	call digit
	movb %bl, %al
	andb $0xf, %al
	call digit
	incl %esi
	decl %ecx
	jnz hex
	ret

digit:	addb $'0', %al
	cmpb $'9', %al
	jbe put
	addb $'a' - '0' - 10, %al
put:	movb %al, %ah
	movw $LINE_STATUS, %dx
full:	inb %dx, %al
	testb $0x20, %al			/* transmitter empty */
	jz full
	movb %ah, %al
	movw $COM1, %dx
	outb %al, %dx
	ret

print:	movb (%esi), %al
	incl %esi
	testb %al, %al
	jz printed
	call put
	jmp print
printed:
	ret

	.include "banner.inc"
none:	.asciz "TPM none\r\n"
said_rc:
	.asciz "TPM rc="
said_pcr:
	.asciz " pcr="
said_resets:
	.asciz " resets="
end:	.asciz "\r\n"
resets:	.long 0

/* Commands: tag, size, code, and what belongs to it, most significant byte first. */
startup:					/* TPM2_Startup, TPM_SU_CLEAR */
	.byte 0x80, 0x01, 0, 0, 0, startup_end - startup, 0, 0, 0x01, 0x44, 0, 0
startup_end:
extend:						/* TPM2_PCR_Extend, PCR 10, no password, one SHA-256 digest */
	.byte 0x80, 0x02, 0, 0, 0, extend_end - extend, 0, 0, 0x01, 0x82
	.byte 0, 0, 0, 10, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0
	.byte 0, 0, 0, 1, 0, 0x0b
	.ascii "this is what was measured of it."
extend_end:
clock:						/* TPM2_ReadClock */
	.byte 0x80, 0x01, 0, 0, 0, clock_end - clock, 0, 0, 0x01, 0x81
clock_end:
pcr:						/* TPM2_PCR_Read, bank SHA-256, PCR 10 */
	.byte 0x80, 0x01, 0, 0, 0, pcr_end - pcr, 0, 0, 0x01, 0x7e
	.byte 0, 0, 0, 1, 0, 0x0b, 3, 0, 0x04, 0
pcr_end:
