// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* A module that does nothing, for others to hide. */
#include "specimen.h"

static int __init start(void)
{
	return specimen_in_lab();
}

static void __exit end(void)
{
}

module_init(start);
module_exit(end);
SPECIMEN("Does nothing");
