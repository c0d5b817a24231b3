/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* Hides something and shows it again, by turns, until the module is unloaded. */
#ifndef BLINKING_H
#define BLINKING_H

#include "specimen.h"
#include <linux/delay.h>
#include <linux/kthread.h>

static unsigned int hidden_us = 20000;
module_param(hidden_us, uint, 0400);
static unsigned int shown_us = 20000;
module_param(shown_us, uint, 0400);

static void hide(void);
static void show(void);

static struct task_struct *blinking;

static int blink(void *unused)
{
	while (!kthread_should_stop()) {
		hide();
		usleep_range(hidden_us, hidden_us + 1);
		show();
		usleep_range(shown_us, shown_us + 1);
	}
	return 0;
}

static inline int start_blinking(void)
{
	blinking = kthread_run(blink, NULL, "blinking");
	return PTR_ERR_OR_ZERO(blinking);
}

static inline void end_blinking(void)
{
	kthread_stop(blinking);
}

#endif
