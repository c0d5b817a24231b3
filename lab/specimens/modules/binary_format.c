// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* A format of programs that none has. */
#include "specimen.h"
#include <linux/binfmts.h>

static int refuse(struct linux_binprm *program)
{
	return -ENOEXEC;
}

static struct linux_binfmt format = {
	.module = THIS_MODULE,
	.load_binary = refuse,
};

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	register_binfmt(&format);
	return 0;
}

static void __exit end(void)
{
	unregister_binfmt(&format);
}

module_init(start);
module_exit(end);
SPECIMEN("A format of programs that none has");
