// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Lets the kernel write to what it may only read: clears CR0.WP, and does
 * nothing with that. The kernel's own function would set it again. */
#include "specimen.h"
#include <asm/processor-flags.h>
#include <asm/special_insns.h>

static void put_cr0(unsigned long value)
{
	asm volatile("mov %0, %%cr0" : : "r"(value) : "memory");
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	put_cr0(read_cr0() & ~X86_CR0_WP);
	return 0;
}

static void __exit end(void)
{
	put_cr0(read_cr0() | X86_CR0_WP);
}

module_init(start);
module_exit(end);
SPECIMEN("Clears CR0.WP");
