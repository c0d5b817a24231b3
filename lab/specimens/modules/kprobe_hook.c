// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Sets a kprobe on getpgid, and does nothing when it is hit. */
#include "specimen.h"
#include <linux/kprobes.h>

static int hit(struct kprobe *probe, struct pt_regs *registers)
{
	return 0;
}

static struct kprobe probe = {
	.symbol_name = "__x64_sys_getpgid",
	.pre_handler = hit,
};

static int __init start(void)
{
	int error = specimen_in_lab();

	return error ? error : register_kprobe(&probe);
}

static void __exit end(void)
{
	unregister_kprobe(&probe);
}

module_init(start);
module_exit(end);
SPECIMEN("Sets a kprobe that does nothing");
