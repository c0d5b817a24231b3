// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Writes a jump over the empty instruction with which a kernel function
 * starts; it leads to one that jumps back behind it. */
#include "specimen.h"
#include <asm/nospec-branch.h>

SPECIMEN_ADDRESS(__x64_sys_getpgid);

void *specimen_detour_back;
extern char specimen_detour[];
asm(".pushsection .text\n"
    ".type specimen_detour, @function\n"
    "specimen_detour:\n"
    ANNOTATE_RETPOLINE_SAFE
    "jmp *specimen_detour_back(%rip)\n"
    ".size specimen_detour, . - specimen_detour\n"
    ".popsection\n");

static const u8 empty[5] = { 0x0f, 0x1f, 0x44, 0x00, 0x00 };
static unsigned long place;

static int __init start(void)
{
	int error = specimen_in_lab();
	u8 jump[5] = { 0xe9 };
	s32 distance;
	int skipped;

	if (error)
		return error;
	if (!__x64_sys_getpgid_address)
		return -EINVAL;
	for (skipped = 0; skipped < 16; skipped++) {
		place = __x64_sys_getpgid_address + skipped;
		if (!memcmp((void *)place, empty, sizeof(empty)))
			break;
	}
	if (skipped == 16)
		return -ENOENT;
	specimen_detour_back = (void *)(place + sizeof(empty));
	distance = (long)specimen_detour - (long)(place + sizeof(jump));
	memcpy(jump + 1, &distance, sizeof(distance));
	return specimen_write(place, jump, sizeof(jump));
}

static void __exit end(void)
{
	specimen_write(place, empty, sizeof(empty));
}

module_init(start);
module_exit(end);
SPECIMEN("Writes a jump into the start of a kernel function");
