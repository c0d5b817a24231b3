// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Adds a code segment to the first processor's table of segments, in an entry
 * that the kernel does not use. Nothing ever selects it. */
#include "specimen.h"
#include <asm/desc.h>

/* Between the user's code and the task's state. */
#define UNUSED 7
/* 64-bit code of privilege 3. */
#define CODE 0x00affb000000ffffULL

static u64 before;

static void *place(void)
{
	return (u64 *)get_cpu_gdt_rw(0) + UNUSED;
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	before = *(u64 *)place();
	*(u64 *)place() = CODE;
	return 0;
}

static void __exit end(void)
{
	*(u64 *)place() = before;
}

module_init(start);
module_exit(end);
SPECIMEN("Adds a segment descriptor");
