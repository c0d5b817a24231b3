// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Is called when a counter runs over, which this one never does. */
#include "specimen.h"
#include <linux/perf_event.h>

static struct perf_event *event;

static void overflow(struct perf_event *event, struct perf_sample_data *data,
		     struct pt_regs *registers)
{
}

static struct perf_event_attr attributes = {
	.type = PERF_TYPE_SOFTWARE,
	.config = PERF_COUNT_SW_DUMMY,
	.size = sizeof(struct perf_event_attr),
	.sample_period = 1000000,
	.pinned = 1,
};

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	event = perf_event_create_kernel_counter(&attributes, 0, NULL, overflow,
						 NULL);
	return PTR_ERR_OR_ZERO(event);
}

static void __exit end(void)
{
	perf_event_release_kernel(event);
}

module_init(start);
module_exit(end);
SPECIMEN("A performance event that never overflows");
