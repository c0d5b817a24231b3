// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Is handed a copy of every packet of one device, and drops it unseen. */
#include "specimen.h"
#include <linux/if_ether.h>
#include <linux/netdevice.h>
#include <linux/skbuff.h>
#include <net/net_namespace.h>

static struct net_device *device;

static int drop(struct sk_buff *packet, struct net_device *device,
		struct packet_type *type, struct net_device *original)
{
	kfree_skb(packet);
	return NET_RX_SUCCESS;
}

static struct packet_type handler = {
	.type = cpu_to_be16(ETH_P_ALL),
	.func = drop,
};

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	device = dev_get_by_name(&init_net, "lo");
	if (!device)
		return -ENODEV;
	handler.dev = device;
	dev_add_pack(&handler);
	return 0;
}

static void __exit end(void)
{
	dev_remove_pack(&handler);
	dev_put(device);
}

module_init(start);
module_exit(end);
SPECIMEN("A packet handler of one device that looks at no packet");
