// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* A kernel thread that sleeps. */
#include "specimen.h"
#include <linux/kthread.h>

static struct task_struct *thread;

static int rest(void *data)
{
	while (!kthread_should_stop())
		schedule_timeout_interruptible(HZ);
	return 0;
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	thread = kthread_run(rest, NULL, "specimen-thread");
	return PTR_ERR_OR_ZERO(thread);
}

static void __exit end(void)
{
	kthread_stop(thread);
}

module_init(start);
module_exit(end);
SPECIMEN("A kernel thread that sleeps");
