// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Loads a copy of the table of interrupts. The lab's guests have one
 * processor. */
#include "specimen.h"
#include <asm/desc.h>

static struct desc_ptr before;
static struct desc_ptr after;
static void *copy;

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	copy = (void *)get_zeroed_page(GFP_KERNEL);
	if (!copy)
		return -ENOMEM;
	asm volatile("sidt %0" : "=m"(before));
	memcpy(copy, (void *)before.address, before.size + 1);
	after.size = before.size;
	after.address = (unsigned long)copy;
	asm volatile("lidt %0" : : "m"(after));
	return 0;
}

static void __exit end(void)
{
	asm volatile("lidt %0" : : "m"(before));
	free_page((unsigned long)copy);
}

module_init(start);
module_exit(end);
SPECIMEN("Loads a copy of the table of interrupts");
