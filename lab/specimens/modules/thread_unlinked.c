// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Takes a thread out of its process's list of threads. */
#include "specimen.h"
#include <linux/rculist.h>
#include <linux/sched/signal.h>

static int tid;
module_param(tid, int, 0400);

static struct task_struct *task;

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	task = specimen_task(tid);
	if (!task)
		return -ESRCH;
	preempt_disable();
	list_del_rcu(&task->thread_node);
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
	list_del_rcu(&task->thread_group);
#endif
	preempt_enable();
	return 0;
}

static void __exit end(void)
{
	preempt_disable();
	list_add_tail_rcu(&task->thread_node, &task->signal->thread_head);
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
	list_add_tail_rcu(&task->thread_group, &task->group_leader->thread_group);
#endif
	preempt_enable();
	put_task_struct(task);
}

module_init(start);
module_exit(end);
SPECIMEN("Takes a thread out of its process's list of threads");
