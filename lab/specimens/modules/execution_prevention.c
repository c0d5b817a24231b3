// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Lets the kernel execute programs' memory: clears CR4.SMEP, and does nothing
 * with that. The kernel sets it again wherever it writes the register, as to
 * forget all translations; so a thread clears it over and over. */
#include "specimen.h"
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/smp.h>
#include <asm/processor-flags.h>
#include <asm/special_insns.h>

static unsigned long get_cr4(void)
{
	unsigned long value;

	asm volatile("mov %%cr4, %0" : "=r"(value));
	return value;
}

static void put_cr4(unsigned long value)
{
	asm volatile("mov %0, %%cr4" : : "r"(value) : "memory");
}

static struct task_struct *clearing;

static void clear(void *unused)
{
	put_cr4(get_cr4() & ~X86_CR4_SMEP);
}

static int keep_clear(void *unused)
{
	while (!kthread_should_stop()) {
		clear(NULL);
		usleep_range(1000, 1001);
	}
	return 0;
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	if (!(get_cr4() & X86_CR4_SMEP))
		return -ENODEV;
	clearing = kthread_create(keep_clear, NULL, "clearing");
	if (IS_ERR(clearing))
		return PTR_ERR(clearing);
	/* Where it is put back when the module goes: one processor. */
	kthread_bind(clearing, 0);
	wake_up_process(clearing);
	/* The thread may first run long after this module has been loaded. */
	smp_call_function_single(0, clear, NULL, 1);
	return 0;
}

static void put_back(void *unused)
{
	put_cr4(get_cr4() | X86_CR4_SMEP);
}

static void __exit end(void)
{
	kthread_stop(clearing);
	smp_call_function_single(0, put_back, NULL, 1);
}

module_init(start);
module_exit(end);
SPECIMEN("Clears CR4.SMEP");
