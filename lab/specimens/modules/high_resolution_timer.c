// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* A high-resolution timer that goes off in a day, and does nothing then. */
#include "specimen.h"
#include <linux/hrtimer.h>
#include <linux/ktime.h>

static struct hrtimer timer;

static enum hrtimer_restart due(struct hrtimer *timer)
{
	return HRTIMER_NORESTART;
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	hrtimer_init(&timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL);
	timer.function = due;
	hrtimer_start(&timer, ktime_set(24 * 3600, 0), HRTIMER_MODE_REL);
	return 0;
}

static void __exit end(void)
{
	hrtimer_cancel(&timer);
}

module_init(start);
module_exit(end);
SPECIMEN("A high-resolution timer that goes off in a day");
