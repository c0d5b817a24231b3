// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Takes another module out of /sys/module. Its files there don't come back
 * with its folder. */
#include "specimen.h"
#include <linux/kobject.h>

static char *victim = "resident";
module_param(victim, charp, 0400);

static struct module *hidden;

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	hidden = specimen_module(victim);
	if (!hidden)
		return -ENOENT;
	kobject_del(&hidden->mkobj.kobj);
	return 0;
}

static void __exit end(void)
{
	if (kobject_add(&hidden->mkobj.kobj, NULL, "%s", hidden->name))
		pr_err("%s stays out of /sys/module\n", hidden->name);
}

module_init(start);
module_exit(end);
SPECIMEN("Takes another module out of /sys/module");
