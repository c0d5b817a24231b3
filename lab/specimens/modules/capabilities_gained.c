// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Gives a process of an ordinary user all capabilities, in place. */
#include "specimen.h"
#include <linux/cred.h>

static int pid;
module_param(pid, int, 0400);

static struct task_struct *task;
static struct cred *cred;
static kernel_cap_t effective, permitted;

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	task = specimen_task(pid);
	if (!task)
		return -ESRCH;
	cred = (struct cred *)task->real_cred;
	effective = cred->cap_effective;
	permitted = cred->cap_permitted;
	cred->cap_effective = CAP_FULL_SET;
	cred->cap_permitted = CAP_FULL_SET;
	return 0;
}

static void __exit end(void)
{
	cred->cap_effective = effective;
	cred->cap_permitted = permitted;
	put_task_struct(task);
}

module_init(start);
module_exit(end);
SPECIMEN("Gives a process all capabilities in place");
