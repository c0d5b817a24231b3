// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Lets a process use the credentials of process 1, uncounted. */
#include "specimen.h"
#include <linux/cred.h>

static int pid;
module_param(pid, int, 0400);

static struct task_struct *task;
static const struct cred *effective, *real;

static int __init start(void)
{
	int error = specimen_in_lab();
	struct task_struct *first;

	if (error)
		return error;
	first = specimen_task(1);
	if (!first)
		return -ESRCH;
	task = specimen_task(pid);
	if (!task) {
		put_task_struct(first);
		return -ESRCH;
	}
	effective = task->cred;
	real = task->real_cred;
	rcu_assign_pointer(task->real_cred, first->real_cred);
	rcu_assign_pointer(task->cred, first->cred);
	put_task_struct(first);
	return 0;
}

static void __exit end(void)
{
	rcu_assign_pointer(task->cred, effective);
	rcu_assign_pointer(task->real_cred, real);
	put_task_struct(task);
}

module_init(start);
module_exit(end);
SPECIMEN("Lets a process use the credentials of process 1");
