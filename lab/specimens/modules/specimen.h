/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * What every specimen of a kernel module begins with.
 *
 * A specimen makes one state in the kernel that a detector has to notice, and
 * takes it back when it is unloaded. What it puts in the place of something
 * does what was there before. It loads in a disposable guest of the lab and
 * nowhere else: specimen_in_lab() is the first call of each.
 */
#ifndef SPECIMEN_H
#define SPECIMEN_H

#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pid.h>
#include <linux/sched.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/vmalloc.h>
#include <asm/cpufeature.h>
#include <asm/sync_core.h>

/* The word on the kernel's command line that only the lab puts there. */
#define SPECIMEN_MARK "secmon.lab=disposable"

#define SPECIMEN(about)                                                        \
	MODULE_LICENSE("Dual MIT/GPL");                                        \
	MODULE_DESCRIPTION(about)

/* The address of a symbol that is not exported: the lab's agent gives it. */
#define SPECIMEN_ADDRESS(symbol)                                               \
	static unsigned long symbol##_address;                                 \
	module_param_named(symbol, symbol##_address, ulong, 0400)

/* Zero in a virtual machine whose kernel was started by the lab. */
static inline int specimen_in_lab(void)
{
	char line[1024];
	struct file *file;
	loff_t at = 0;
	ssize_t length;
	char *mark;

	if (!boot_cpu_has(X86_FEATURE_HYPERVISOR))
		return -EPERM;
	file = filp_open("/proc/cmdline", O_RDONLY, 0);
	if (IS_ERR(file))
		return -EPERM;
	length = kernel_read(file, line, sizeof(line) - 1, &at);
	filp_close(file, NULL);
	if (length <= 0)
		return -EPERM;
	line[length] = 0;
	mark = strstr(line, " " SPECIMEN_MARK);
	if (!mark)
		return -EPERM;
	mark += strlen(" " SPECIMEN_MARK);
	return *mark == 0 || *mark == ' ' || *mark == '\n' ? 0 : -EPERM;
}

/*
 * Writes to the kernel's own image where the kernel itself may only read,
 * through a second mapping of the page that goes away again. The lab's guests have one processor, so that
 * nothing runs meanwhile. The bytes may not cross a page.
 */
static inline int specimen_write(unsigned long address, const void *bytes,
				 size_t length)
{
	struct page *page;
	unsigned long flags;
	void *alias;

	if (!address || offset_in_page(address) + length > PAGE_SIZE)
		return -EINVAL;
	page = virt_to_page((void *)address);
	alias = vmap(&page, 1, VM_MAP, PAGE_KERNEL);
	if (!alias)
		return -ENOMEM;
	local_irq_save(flags);
	memcpy(alias + offset_in_page(address), bytes, length);
	sync_core();
	local_irq_restore(flags);
	vunmap(alias);
	return 0;
}

/* Replaces a pointer; what was there is left in *before. */
static inline int specimen_replace(void *place, void *with, void **before)
{
	if (before)
		*before = *(void **)place;
	return specimen_write((unsigned long)place, &with, sizeof(with));
}

/* The process or thread with that number, referenced. */
static inline struct task_struct *specimen_task(int number)
{
	struct pid *pid = find_get_pid(number);
	struct task_struct *task = get_pid_task(pid, PIDTYPE_PID);

	put_pid(pid);
	return task;
}

/* Another loaded module, by its name. */
static inline struct module *specimen_module(const char *name)
{
	struct list_head *at;
	struct module *module;

	/* The head of the list is no module, and its "name" is none. */
	for (at = THIS_MODULE->list.next; at != &THIS_MODULE->list;
	     at = at->next) {
		module = list_entry(at, struct module, list);
		if (!strncmp(module->name, name, MODULE_NAME_LEN))
			return module;
	}
	return NULL;
}

#endif
