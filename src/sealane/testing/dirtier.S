/*
 * The guest of the stream captures: no operating system, 32-bit, loaded by -kernel (multiboot 1). It fills pages from
 * 4 MiB on and goes round for ever, changing some and zeroing some, and writes one letter to the serial port each round.
 * What it writes repeats within a page, so that captures compress well.
 *
 *   PAGES   how many pages it works on    (assembled in)
 *   PAUSE   how long it waits a round     (assembled in)
 */
	.code32
	.text
	.globl _start
_start:
	.align 4
header:
	.long 0x1BADB002		/* multiboot magic */
	.long 0x00010000		/* addresses are in this header, the file is no ELF */
	.long -(0x1BADB002 + 0x00010000)
	.long 0x100000			/* header_addr: the header opens the file, at 1 MiB */
	.long 0x100000			/* load_addr */
	.long 0, 0			/* load_end_addr: all; bss_end_addr: none */
	.long 0x100000 + (begin - header)
begin:
	cld
	xorl %ebp, %ebp			/* the round */
round:
	incl %ebp
	xorl %ebx, %ebx			/* the page in the round */
page:
	movl %ebx, %edi
	shll $12, %edi
	addl $0x400000, %edi
	movl %ebx, %eax
	addl %ebp, %eax
	andl $15, %eax
	cmpl $1, %ebp
	je fill				/* the first round fills all */
	cmpl $3, %eax
	ja next				/* the others leave most pages alone, */
	je clear			/* clear one in sixteen */
	cmpl $0, %eax
	jne touch			/* and change a word in two */
fill:
	imull $0x01000193, %ebx, %eax
	xorl %ebp, %eax
	testl $4, %ebx			/* runs of four pages, and of four zero pages */
	jz store
	cmpl $1, %ebp
	jne store
clear:
	xorl %eax, %eax
store:
	movl $1024, %ecx
	rep stosl
	jmp next
touch:
	movl %ebp, 512(%edi)
next:
	incl %ebx
	cmpl $PAGES, %ebx
	jb page
	movw $0x3f8, %dx
	movl %ebp, %eax
	andl $15, %eax
	addl $'A', %eax
	outb %al, %dx
	movl $PAUSE, %ecx
wait:
	pause
	loop wait
	jmp round
