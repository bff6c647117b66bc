/* x86 PC boot sector that writes numbered sectors to the first IDE disk there is, by programmed I/O, for ever.

   Block n fills a sector with 32 copies of "BLOCK <n>\r\n" (16 bytes). The sectors are a ring: RING_SECTORS of them from RING_START.
   The same 16 bytes go to COM1 once the disk has taken the block and its cache is flushed: a number seen is a number on the disk.
   An error from the disk prints "!" and the block is tried again. */
	.set COM1, 0x3f8
	.set LINE_STATUS, COM1 + 5
	.set PRIMARY, 0x1f0			/* IDE: data; +2 count, +3 +4 +5 address, +6 drive, +7 command and status */
	.set SECONDARY, 0x170
	.set LINEAR, 0xe0			/* drive register: linear addresses, first drive of the bus */
	.set SECOND, 0x10
	.set BUFFER, 0x8000
	.set BUSY, 0x80
	.set FAULT_OR_ERROR, 0x21
	.set DATA_REQUEST, 0x08
	.globl _start
	.code16

_start:	cli
	cld
	xorw %ax, %ax
	movw %ax, %ds
	movw %ax, %es
	movw %ax, %ss
	movw $0x7c00, %sp
	movw $banner, %si
	call print

find:	movw $PRIMARY, %bp			/* the bus in %bp */
bus:	movb $LINEAR, drive
	call identify
	jnz next
	movb $LINEAR + SECOND, drive
	call identify
	jnz next
	cmpw $SECONDARY, %bp
	je find
	movw $SECONDARY, %bp
	jmp bus

next:	movw $number_end, %si			/* count the number up: decimal digits, right to left while they overflow */
carry:	decw %si
	incb (%si)
	cmpb $'9', (%si)
	jbe counted
	movb $'0', (%si)
	jmp carry
counted:
	movw $BUFFER, %di
	movw $32, %bx
copy:	movw $record, %si
	movw $8, %cx
	rep movsw
	decw %bx
	jnz copy

write:	call select
	leaw 2(%bp), %dx			/* one sector */
	movb $1, %al
	outb %al, %dx
	incw %dx				/* its address, low byte first */
	movw sector, %ax
	outb %al, %dx
	incw %dx
	movb %ah, %al
	outb %al, %dx
	incw %dx
	xorb %al, %al
	outb %al, %dx
	leaw 7(%bp), %dx
	movb $0x30, %al				/* WRITE SECTORS */
	outb %al, %dx
	call idle
	testb $FAULT_OR_ERROR, %al
	jnz failed
	testb $DATA_REQUEST, %al
	jz failed
	movw $BUFFER, %si
	movw $256, %cx
	movw %bp, %dx
	rep outsw
	call idle
	testb $FAULT_OR_ERROR, %al
	jnz failed
	leaw 7(%bp), %dx
	movb $0xe7, %al				/* FLUSH CACHE */
	outb %al, %dx
	call idle
	testb $FAULT_OR_ERROR, %al
	jnz failed

	movw $record, %si
	call print
	movw sector, %ax			/* the next sector of the ring */
	incw %ax
	cmpw $RING_START + RING_SECTORS, %ax
	jb inside
	movw $RING_START, %ax
inside:	movw %ax, sector
	call pause
	jmp next

failed:	movw $mark, %si
	call print
	call pause
	jmp write

identify:					/* not zero: the drive is there, and a disk. (The status alone may be that of its neighbour) */
	call select
	leaw 7(%bp), %dx
	movb $0xec, %al				/* IDENTIFY DEVICE */
	outb %al, %dx
	call idle
	testb $DATA_REQUEST, %al
	jz 1f
	movw $BUFFER, %di
	movw $256, %cx
	movw %bp, %dx
	rep insw
	testb $DATA_REQUEST, %al
1:	ret

select:	leaw 6(%bp), %dx
	movb drive, %al
	outb %al, %dx				/* and wait for it: */
idle:	leaw 7(%bp), %dx			/* waits for the drive; its status in %al */
1:	inb %dx, %al
	testb $BUSY, %al
	jnz 1b
	ret

print:	movb (%si), %ah				/* the text at %si to the serial port */
	incw %si
	testb %ah, %ah
	jz 2f
	movw $LINE_STATUS, %dx
1:	inb %dx, %al
	testb $0x20, %al			/* transmitter empty */
	jz 1b
	movw $COM1, %dx
	movb %ah, %al
	outb %al, %dx
	jmp print
2:	ret

pause:	movl $DELAY, %ecx
1:	decl %ecx
	jnz 1b
	ret

	.include "banner.inc"
record:	.ascii "BLOCK 00000000"
number_end:
	.asciz "\r\n"
mark:	.asciz "!"
	.balign 2
sector:	.word RING_START
drive:	.byte 0
	.org 510
	.word 0xaa55
