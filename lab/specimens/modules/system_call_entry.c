// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Replaces getpgid in the table of system calls by a function that calls it. */
#include "specimen.h"
#include <asm/unistd.h>

struct pt_regs;

SPECIMEN_ADDRESS(sys_call_table);

static long (*original)(const struct pt_regs *registers);

static long instead(const struct pt_regs *registers)
{
	return original(registers);
}

static void **entry(void)
{
	return (void **)sys_call_table_address + __NR_getpgid;
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	if (!sys_call_table_address)
		return -EINVAL;
	return specimen_replace(entry(), instead, (void **)&original);
}

static void __exit end(void)
{
	specimen_replace(entry(), original, NULL);
}

module_init(start);
module_exit(end);
SPECIMEN("Replaces an entry of the table of system calls");
