// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Replaces the operations of the loopback device by a copy with a function of
 * its own, which calls the one before. */
#include "specimen.h"
#include <linux/netdevice.h>
#include <linux/skbuff.h>
#include <net/net_namespace.h>

static struct net_device *device;
static const struct net_device_ops *before;
static struct net_device_ops copy;

static netdev_tx_t transmit(struct sk_buff *packet, struct net_device *device)
{
	return before->ndo_start_xmit(packet, device);
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	device = dev_get_by_name(&init_net, "lo");
	if (!device)
		return -ENODEV;
	before = device->netdev_ops;
	copy = *before;
	copy.ndo_start_xmit = transmit;
	WRITE_ONCE(device->netdev_ops, &copy);
	return 0;
}

static void __exit end(void)
{
	WRITE_ONCE(device->netdev_ops, before);
	synchronize_net();
	dev_put(device);
}

module_init(start);
module_exit(end);
SPECIMEN("Replaces the operations of the loopback device");
