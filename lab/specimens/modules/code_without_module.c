// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* A kernel thread that runs in executable memory which belongs to no module,
 * as one does whose module took itself away. It sleeps. */
#include "specimen.h"
#include <linux/kthread.h>
#include <linux/sched.h>

/* push rbx; again: edi = ticks; call schedule_timeout_interruptible;
 * call kthread_should_stop; test al, al; jz again; xor eax, eax; pop rbx; ret */
static const u8 code[] = {
	0x53,
	0xbf, 0, 0, 0, 0,
	0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xd0,
	0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xd0,
	0x84, 0xc0,
	0x74, 0xdf,
	0x31, 0xc0, 0x5b, 0xc3,
};
#define TICKS_AT 2
#define SLEEP_AT 8
#define STOP_AT 20

static struct page *page;
static void *executable;
static struct task_struct *thread;

static int __init start(void)
{
	int error = specimen_in_lab();
	u32 ticks = HZ / 4;
	void *sleep = schedule_timeout_interruptible;
	void *stop = kthread_should_stop;
	unsigned int level;
	pte_t *entry;
	u8 *bytes;

	if (error)
		return error;
	page = alloc_page(GFP_KERNEL);
	if (!page)
		return -ENOMEM;
	bytes = page_address(page);
	memset(bytes, 0xcc, PAGE_SIZE);
	memcpy(bytes, code, sizeof(code));
	memcpy(bytes + TICKS_AT, &ticks, sizeof(ticks));
	memcpy(bytes + SLEEP_AT, &sleep, sizeof(sleep));
	memcpy(bytes + STOP_AT, &stop, sizeof(stop));
	executable = vmap(&page, 1, VM_MAP, PAGE_KERNEL);
	if (!executable) {
		__free_page(page);
		return -ENOMEM;
	}
	/* vmap() lets no caller have memory that can be executed. */
	entry = lookup_address((unsigned long)executable, &level);
	WRITE_ONCE(entry->pte, entry->pte & ~_PAGE_NX);
	asm volatile("invlpg (%0)" ::"r"(executable) : "memory");
	thread = kthread_run(executable, NULL, "specimen-code");
	if (IS_ERR(thread)) {
		vunmap(executable);
		__free_page(page);
		return PTR_ERR(thread);
	}
	return 0;
}

static void __exit end(void)
{
	kthread_stop(thread);
	vunmap(executable);
	__free_page(page);
}

module_init(start);
module_exit(end);
SPECIMEN("Runs a sleeping kernel thread in memory of no module");
