// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Takes a process out of the list of tasks. */
#include "specimen.h"
#include <linux/rculist.h>

static int pid;
module_param(pid, int, 0400);

static struct task_struct *task;

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	task = specimen_task(pid);
	if (!task)
		return -ESRCH;
	preempt_disable();
	list_del_rcu(&task->tasks);
	preempt_enable();
	return 0;
}

static void __exit end(void)
{
	preempt_disable();
	list_add_tail_rcu(&task->tasks, &init_task.tasks);
	preempt_enable();
	put_task_struct(task);
}

module_init(start);
module_exit(end);
SPECIMEN("Takes a process out of the list of tasks");
