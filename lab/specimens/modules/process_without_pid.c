// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Takes a process's number out of the map from numbers to processes. */
#include "specimen.h"
#include <linux/idr.h>
#include <linux/pid_namespace.h>

static int pid;
module_param(pid, int, 0400);

static struct pid *number;

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	number = find_get_pid(pid);
	if (!number)
		return -ESRCH;
	preempt_disable();
	idr_remove(&init_pid_ns.idr, pid);
	preempt_enable();
	return 0;
}

static void __exit end(void)
{
	preempt_disable();
	if (idr_alloc(&init_pid_ns.idr, number, pid, pid + 1, GFP_ATOMIC) < 0)
		pr_err("the number %d is lost\n", pid);
	preempt_enable();
	put_pid(number);
}

module_init(start);
module_exit(end);
SPECIMEN("Takes a process's number out of the map from numbers to processes");
