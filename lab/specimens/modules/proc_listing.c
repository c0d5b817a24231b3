// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Replaces the function that lists /proc by one that calls it, and leaves out
 * one name if it is given one. */
#include "specimen.h"

SPECIMEN_ADDRESS(proc_root_operations);

static int (*original)(struct file *file, struct dir_context *context);

static char *hide = "";
module_param(hide, charp, 0400);

struct without {
	struct dir_context context;
	struct dir_context *whole;
};

static bool leave_out(struct dir_context *context, const char *name, int length,
		      loff_t at, u64 inode, unsigned int type)
{
	struct without *without =
		container_of(context, struct without, context);

	if (*hide && length == strlen(hide) && !memcmp(name, hide, length))
		return true;
	without->whole->pos = context->pos;
	return without->whole->actor(without->whole, name, length, at, inode,
				     type);
}

static int instead(struct file *file, struct dir_context *context)
{
	struct without without = {
		.context = { .actor = leave_out, .pos = context->pos },
		.whole = context,
	};
	int result = original(file, &without.context);

	context->pos = without.context.pos;
	return result;
}

static void *place(void)
{
	struct file_operations *operations = (void *)proc_root_operations_address;

	return &operations->iterate_shared;
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	if (!proc_root_operations_address)
		return -EINVAL;
	return specimen_replace(place(), instead, (void **)&original);
}

static void __exit end(void)
{
	specimen_replace(place(), original, NULL);
}

module_init(start);
module_exit(end);
SPECIMEN("Replaces the function that lists /proc");
