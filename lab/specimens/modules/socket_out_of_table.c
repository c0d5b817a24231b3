// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Takes the listening socket of a process out of the table of listeners. */
#include "specimen.h"
#include <linux/fdtable.h>
#include <linux/net.h>
#include <net/sock.h>
#include <net/tcp_states.h>

static int pid;
module_param(pid, int, 0400);

static struct sock *hidden;

static int listens(const void *unused, struct file *file, unsigned int number)
{
	struct socket *socket = sock_from_file(file);

	if (!socket || !socket->sk || socket->sk->sk_state != TCP_LISTEN)
		return 0;
	hidden = socket->sk;
	sock_hold(hidden);
	return 1;
}

static int __init start(void)
{
	int error = specimen_in_lab();
	struct task_struct *task;

	if (error)
		return error;
	task = specimen_task(pid);
	if (!task)
		return -ESRCH;
	task_lock(task);
	iterate_fd(task->files, 0, listens, NULL);
	task_unlock(task);
	put_task_struct(task);
	if (!hidden)
		return -ENOTSOCK;
	hidden->sk_prot->unhash(hidden);
	return 0;
}

static void __exit end(void)
{
	hidden->sk_prot->hash(hidden);
	sock_put(hidden);
}

module_init(start);
module_exit(end);
SPECIMEN("Takes a listening socket out of its table");
