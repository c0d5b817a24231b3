// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Leads the gate of the overflow exception, which nothing raises in 64-bit
 * code, to an instruction that jumps where it led. */
#include "specimen.h"
#include <asm/desc_defs.h>
#include <asm/nospec-branch.h>

SPECIMEN_ADDRESS(idt_table);

#define OVERFLOW 4

void *specimen_gate_led_to;
extern char specimen_gate[];
asm(".pushsection .text\n"
    ".type specimen_gate, @function\n"
    "specimen_gate:\n"
    ANNOTATE_RETPOLINE_SAFE
    "jmp *specimen_gate_led_to(%rip)\n"
    ".size specimen_gate, . - specimen_gate\n"
    ".popsection\n");

static gate_desc before;

static unsigned long place(void)
{
	return idt_table_address + OVERFLOW * sizeof(gate_desc);
}

static int __init start(void)
{
	int error = specimen_in_lab();
	unsigned long target = (unsigned long)specimen_gate;
	gate_desc gate;

	if (error)
		return error;
	if (!idt_table_address)
		return -EINVAL;
	before = *(gate_desc *)place();
	specimen_gate_led_to = (void *)gate_offset(&before);
	gate = before;
	gate.offset_low = target;
	gate.offset_middle = target >> 16;
	gate.offset_high = target >> 32;
	return specimen_write(place(), &gate, sizeof(gate));
}

static void __exit end(void)
{
	specimen_write(place(), &before, sizeof(before));
}

module_init(start);
module_exit(end);
SPECIMEN("Replaces a gate of the interrupt descriptor table");
