// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* A timer that goes off in a day, and does nothing then. */
#include "specimen.h"
#include <linux/timer.h>

static void due(struct timer_list *timer)
{
}

static DEFINE_TIMER(timer, due);

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	mod_timer(&timer, jiffies + 24 * 3600 * HZ);
	return 0;
}

static void __exit end(void)
{
	del_timer_sync(&timer);
}

module_init(start);
module_exit(end);
SPECIMEN("A timer that goes off in a day");
