// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Takes a process out of the list of tasks and puts it back, by turns. */
#include "blinking.h"
#include <linux/rculist.h>

static int pid;
module_param(pid, int, 0400);
SPECIMEN_ADDRESS(tasklist_lock);

static struct task_struct *task;

static void hide(void)
{
	rwlock_t *lock = (rwlock_t *)tasklist_lock_address;

	write_lock_irq(lock);
	list_del_rcu(&task->tasks);
	write_unlock_irq(lock);
}

static void show(void)
{
	rwlock_t *lock = (rwlock_t *)tasklist_lock_address;

	write_lock_irq(lock);
	list_add_tail_rcu(&task->tasks, &init_task.tasks);
	write_unlock_irq(lock);
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	if (!tasklist_lock_address)
		return -EINVAL;
	task = specimen_task(pid);
	if (!task)
		return -ESRCH;
	error = start_blinking();
	if (error)
		put_task_struct(task);
	return error;
}

static void __exit end(void)
{
	end_blinking();
	put_task_struct(task);
}

module_init(start);
module_exit(end);
SPECIMEN("Takes a process out of the list of tasks and puts it back, by turns");
