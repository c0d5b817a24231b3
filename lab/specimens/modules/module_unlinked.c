// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Takes another module out of the list of modules. */
#include "specimen.h"

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
	preempt_disable();
	list_del_rcu(&hidden->list);
	preempt_enable();
	return 0;
}

static void __exit end(void)
{
	preempt_disable();
	list_add_rcu(&hidden->list, &THIS_MODULE->list);
	preempt_enable();
}

module_init(start);
module_exit(end);
SPECIMEN("Takes another module out of the list of modules");
