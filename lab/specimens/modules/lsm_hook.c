// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Adds a security hook, behind the back of the security framework, that
 * allows everything. */
#include "specimen.h"
#include <linux/lsm_hooks.h>

static int allow(int type)
{
	return 0;
}

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 12, 0)
SPECIMEN_ADDRESS(security_hook_heads);

static struct security_hook_list hook = { .hook.syslog = allow };

static void *place(void)
{
	struct security_hook_heads *heads = (void *)security_hook_heads_address;

	return &heads->syslog.first;
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	if (!security_hook_heads_address)
		return -EINVAL;
	hook.list.next = *(void **)place();
	return specimen_replace(place(), &hook.list, NULL);
}

static void __exit end(void)
{
	specimen_replace(place(), hook.list.next, NULL);
}
#else
SPECIMEN_ADDRESS(static_calls_table);

static struct lsm_static_call *call;
static void *before;

static int __init start(void)
{
	struct lsm_static_calls_table *calls = (void *)static_calls_table_address;
	int error = specimen_in_lab();
	int slot;

	if (error)
		return error;
	if (!calls)
		return -EINVAL;
	for (slot = 0; slot < MAX_LSM_COUNT; slot++) {
		call = &calls->syslog[slot];
		if (!call->hl)
			break;
	}
	if (slot == MAX_LSM_COUNT)
		return -EBUSY;
	before = call->key->func;
	__static_call_update(call->key, call->trampoline, allow);
	static_key_enable(&call->active->key);
	return 0;
}

static void __exit end(void)
{
	static_key_disable(&call->active->key);
	__static_call_update(call->key, call->trampoline, before);
}
#endif

module_init(start);
module_exit(end);
SPECIMEN("Adds a security hook that allows everything");
