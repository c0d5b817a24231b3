// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Work that is due in a day, and does nothing then. */
#include "specimen.h"
#include <linux/workqueue.h>

static void due(struct work_struct *work)
{
}

static DECLARE_DELAYED_WORK(work, due);

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	schedule_delayed_work(&work, 24 * 3600 * HZ);
	return 0;
}

static void __exit end(void)
{
	cancel_delayed_work_sync(&work);
}

module_init(start);
module_exit(end);
SPECIMEN("Work that is due in a day");
