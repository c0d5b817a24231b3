// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Asks ftrace for a call at the start of getpgid, and does nothing in it. */
#include "specimen.h"
#include <linux/ftrace.h>

static char function[] = "__x64_sys_getpgid";

static void notrace called(unsigned long address, unsigned long from,
			   struct ftrace_ops *operations,
			   struct ftrace_regs *registers)
{
}

static struct ftrace_ops operations = { .func = called };

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	error = ftrace_set_filter(&operations, function, strlen(function), 1);
	if (error)
		return error;
	return register_ftrace_function(&operations);
}

static void __exit end(void)
{
	unregister_ftrace_function(&operations);
	ftrace_free_filter(&operations);
}

module_init(start);
module_exit(end);
SPECIMEN("Has ftrace call it and does nothing");
