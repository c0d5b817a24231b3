// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Leads the branch to getpgid, in the code that dispatches system calls of
 * 32-bit programs, to a function that calls it. */
#include "specimen.h"

struct pt_regs;

SPECIMEN_ADDRESS(ia32_sys_call);
SPECIMEN_ADDRESS(__ia32_sys_getpgid);

/* More than the whole function has. */
#define SEARCHED 0x8000

static unsigned long branch;
static s32 before;

static long instead(const struct pt_regs *registers)
{
	long (*original)(const struct pt_regs *) =
		(void *)__ia32_sys_getpgid_address;

	return original(registers);
}

static int __init start(void)
{
	int error = specimen_in_lab();
	unsigned long at;
	s32 distance;

	if (error)
		return error;
	if (!ia32_sys_call_address || !__ia32_sys_getpgid_address)
		return -EINVAL;
	for (at = ia32_sys_call_address; at < ia32_sys_call_address + SEARCHED;
	     at++) {
		u8 code = *(u8 *)at;

		/* call, jmp and, after its 0x0f, any conditional jump. */
		if (code != 0xe8 && code != 0xe9 && (code & 0xf0) != 0x80)
			continue;
		before = *(s32 *)(at + 1);
		if (at + 5 + before != __ia32_sys_getpgid_address)
			continue;
		branch = at + 1;
		distance = (long)instead - (long)(at + 5);
		return specimen_write(branch, &distance, sizeof(distance));
	}
	return -ENOENT;
}

static void __exit end(void)
{
	specimen_write(branch, &before, sizeof(before));
}

module_init(start);
module_exit(end);
SPECIMEN("Patches the code that dispatches 32-bit system calls");
