// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Is told of the end of the system, and does nothing. */
#include "specimen.h"
#include <linux/notifier.h>
#include <linux/reboot.h>

static int told(struct notifier_block *block, unsigned long action, void *data)
{
	return NOTIFY_OK;
}

static struct notifier_block block = { .notifier_call = told };

static int __init start(void)
{
	int error = specimen_in_lab();

	return error ? error : register_reboot_notifier(&block);
}

static void __exit end(void)
{
	unregister_reboot_notifier(&block);
}

module_init(start);
module_exit(end);
SPECIMEN("A reboot notifier that does nothing");
