// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Replaces the function that shows a line of /proc/net/tcp by one that calls
 * it, and leaves out one port if it is given one. */
#include "specimen.h"
#include <linux/seq_file.h>
#include <net/sock.h>

SPECIMEN_ADDRESS(tcp4_seq_ops);

static int (*original)(struct seq_file *file, void *socket);

static ushort hide;
module_param(hide, ushort, 0400);

static int instead(struct seq_file *file, void *socket)
{
	/* All that are shown begin alike, whatever their state. */
	const struct sock_common *common = socket;

	if (hide && socket != SEQ_START_TOKEN && common->skc_num == hide)
		return 0;
	return original(file, socket);
}

static void *place(void)
{
	struct seq_operations *operations = (void *)tcp4_seq_ops_address;

	return &operations->show;
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	if (!tcp4_seq_ops_address)
		return -EINVAL;
	return specimen_replace(place(), instead, (void **)&original);
}

static void __exit end(void)
{
	specimen_replace(place(), original, NULL);
}

module_init(start);
module_exit(end);
SPECIMEN("Replaces the function that shows a line of /proc/net/tcp");
