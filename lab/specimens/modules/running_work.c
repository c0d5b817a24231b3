// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Work that runs on one of the kernel's workers, and sleeps there. */
#include "specimen.h"
#include <linux/completion.h>
#include <linux/workqueue.h>

static DECLARE_COMPLETION(over);

static void rest(struct work_struct *work)
{
	while (wait_for_completion_interruptible(&over))
		schedule_timeout_uninterruptible(HZ);
}

static DECLARE_WORK(work, rest);

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	queue_work(system_unbound_wq, &work);
	return 0;
}

static void __exit end(void)
{
	complete(&over);
	flush_work(&work);
}

module_init(start);
module_exit(end);
SPECIMEN("Work that sleeps on a worker");
