// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Leads the branch to getpgid, in the code that dispatches system calls, to a
 * function that calls it. */
#include "dispatch.h"

SPECIMEN_ADDRESS(x64_sys_call);
SPECIMEN_ADDRESS(__x64_sys_getpgid);

static unsigned long dispatcher(void)
{
	return x64_sys_call_address;
}

static unsigned long entry(void)
{
	return __x64_sys_getpgid_address;
}

static int __init start(void)
{
	int error = specimen_in_lab();

	return error ? error : start_dispatch();
}

static void __exit end(void)
{
	end_dispatch();
}

module_init(start);
module_exit(end);
SPECIMEN("Patches the code that dispatches system calls");
