// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Makes a process one of user 0, in its credentials as they are. */
#include "specimen.h"
#include <linux/cred.h>

static int pid;
module_param(pid, int, 0400);

static struct task_struct *task;
static struct cred *cred;
static kuid_t before[4];

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	task = specimen_task(pid);
	if (!task)
		return -ESRCH;
	cred = (struct cred *)task->real_cred;
	before[0] = cred->uid;
	before[1] = cred->euid;
	before[2] = cred->suid;
	before[3] = cred->fsuid;
	cred->uid = cred->euid = cred->suid = cred->fsuid = GLOBAL_ROOT_UID;
	return 0;
}

static void __exit end(void)
{
	cred->uid = before[0];
	cred->euid = before[1];
	cred->suid = before[2];
	cred->fsuid = before[3];
	put_task_struct(task);
}

module_init(start);
module_exit(end);
SPECIMEN("Makes a process one of user 0 in place");
