// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Lets the kernel execute programs' memory: clears CR4.SMEP, and does nothing
 * with that. The kernel's own function would set it again. */
#include "specimen.h"
#include <asm/processor-flags.h>
#include <asm/special_insns.h>

static unsigned long get_cr4(void)
{
	unsigned long value;

	asm volatile("mov %%cr4, %0" : "=r"(value));
	return value;
}

static void put_cr4(unsigned long value)
{
	asm volatile("mov %0, %%cr4" : : "r"(value) : "memory");
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	if (!(get_cr4() & X86_CR4_SMEP))
		return -ENODEV;
	put_cr4(get_cr4() & ~X86_CR4_SMEP);
	return 0;
}

static void __exit end(void)
{
	put_cr4(get_cr4() | X86_CR4_SMEP);
}

module_init(start);
module_exit(end);
SPECIMEN("Clears CR4.SMEP");
