/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/* Leads a branch of the code that dispatches system calls, from the function
 * of one of them to a function that calls it. */
#ifndef DISPATCH_H
#define DISPATCH_H

#include "specimen.h"

struct pt_regs;

/* Where the code starts, and the system call's own function. */
static unsigned long dispatcher(void);
static unsigned long entry(void);

/* More than the whole function has. */
#define SEARCHED 0x8000

static unsigned long branch;
static s32 before;

static long instead(const struct pt_regs *registers)
{
	long (*original)(const struct pt_regs *) = (void *)entry();

	return original(registers);
}

static inline int start_dispatch(void)
{
	unsigned long at;
	s32 distance;

	if (!dispatcher() || !entry())
		return -EINVAL;
	for (at = dispatcher(); at < dispatcher() + SEARCHED; at++) {
		u8 code = *(u8 *)at;

		/* call, jmp and, after its 0x0f, any conditional jump. */
		if (code != 0xe8 && code != 0xe9 && (code & 0xf0) != 0x80)
			continue;
		before = *(s32 *)(at + 1);
		if (at + 5 + before != entry())
			continue;
		branch = at + 1;
		distance = (long)instead - (long)(at + 5);
		return specimen_write(branch, &distance, sizeof(distance));
	}
	return -ENOENT;
}

static inline void end_dispatch(void)
{
	specimen_write(branch, &before, sizeof(before));
}

#endif
