// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Replaces the function that lists /proc by one that calls it. */
#include "specimen.h"

SPECIMEN_ADDRESS(proc_root_operations);

static int (*original)(struct file *file, struct dir_context *context);

static int instead(struct file *file, struct dir_context *context)
{
	return original(file, context);
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
