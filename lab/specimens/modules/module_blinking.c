// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Takes another module out of the list of modules and puts it back, by turns. */
#include "blinking.h"

static char *victim = "resident";
module_param(victim, charp, 0400);
SPECIMEN_ADDRESS(module_mutex);

static struct module *hidden;

static void hide(void)
{
	struct mutex *lock = (struct mutex *)module_mutex_address;

	mutex_lock(lock);
	list_del_rcu(&hidden->list);
	mutex_unlock(lock);
}

static void show(void)
{
	struct mutex *lock = (struct mutex *)module_mutex_address;

	mutex_lock(lock);
	list_add_rcu(&hidden->list, &THIS_MODULE->list);
	mutex_unlock(lock);
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	if (!module_mutex_address)
		return -EINVAL;
	hidden = specimen_module(victim);
	if (!hidden)
		return -ENOENT;
	return start_blinking();
}

static void __exit end(void)
{
	end_blinking();
}

module_init(start);
module_exit(end);
SPECIMEN("Takes another module out of the list of modules and puts it back, by turns");
