// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Replaces TCP's function for sending by one that calls it. */
#include "specimen.h"
#include <net/tcp.h>

static int (*original)(struct sock *socket, struct msghdr *message,
		       size_t length);

static int instead(struct sock *socket, struct msghdr *message, size_t length)
{
	return original(socket, message, length);
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	return specimen_replace(&tcp_prot.sendmsg, instead, (void **)&original);
}

static void __exit end(void)
{
	specimen_replace(&tcp_prot.sendmsg, original, NULL);
}

module_init(start);
module_exit(end);
SPECIMEN("Replaces an operation of the protocol TCP");
