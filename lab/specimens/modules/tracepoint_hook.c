// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Attaches to the tracepoint at the end of a process, and does nothing. */
#include "specimen.h"
#include <linux/tracepoint.h>

static struct tracepoint *point;

static void called(void *data, struct task_struct *task)
{
}

static void look(struct tracepoint *candidate, void *data)
{
	if (!strcmp(candidate->name, "sched_process_exit"))
		point = candidate;
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	for_each_kernel_tracepoint(look, NULL);
	if (!point)
		return -ENOENT;
	return tracepoint_probe_register(point, called, NULL);
}

static void __exit end(void)
{
	tracepoint_probe_unregister(point, called, NULL);
	tracepoint_synchronize_unregister();
}

module_init(start);
module_exit(end);
SPECIMEN("Attaches to a tracepoint and does nothing");
