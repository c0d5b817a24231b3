// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Takes a process out of the list of tasks, the map of numbers, its parent's
 * children and its cgroup's members: only what runs it still knows it. */
#include "specimen.h"
#include <linux/cgroup.h>
#include <linux/idr.h>
#include <linux/pid_namespace.h>
#include <linux/rculist.h>

static int pid;
module_param(pid, int, 0400);

static struct task_struct *task;
static struct pid *number;

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	number = find_get_pid(pid);
	task = get_pid_task(number, PIDTYPE_PID);
	if (!task) {
		put_pid(number);
		return -ESRCH;
	}
	preempt_disable();
	list_del_rcu(&task->tasks);
	list_del_init(&task->sibling);
	list_del_init(&task->cg_list);
	idr_remove(&init_pid_ns.idr, pid);
	preempt_enable();
	return 0;
}

static void __exit end(void)
{
	preempt_disable();
	if (idr_alloc(&init_pid_ns.idr, number, pid, pid + 1, GFP_ATOMIC) < 0)
		pr_err("the number %d is lost\n", pid);
	list_add_tail(&task->cg_list, &task_css_set(task)->tasks);
	list_add_tail(&task->sibling, &task->real_parent->children);
	list_add_tail_rcu(&task->tasks, &init_task.tasks);
	preempt_enable();
	put_task_struct(task);
	put_pid(number);
}

module_init(start);
module_exit(end);
SPECIMEN("Takes a process out of every list that leads to it");
