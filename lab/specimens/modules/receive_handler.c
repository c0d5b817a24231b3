// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* Takes the packets of one device before the kernel does, and passes them on. */
#include "specimen.h"
#include <linux/netdevice.h>
#include <linux/rtnetlink.h>
#include <linux/skbuff.h>
#include <net/net_namespace.h>

static struct net_device *device;

static rx_handler_result_t pass(struct sk_buff **packet)
{
	return RX_HANDLER_PASS;
}

static int __init start(void)
{
	int error = specimen_in_lab();

	if (error)
		return error;
	device = dev_get_by_name(&init_net, "lo");
	if (!device)
		return -ENODEV;
	rtnl_lock();
	error = netdev_rx_handler_register(device, pass, NULL);
	rtnl_unlock();
	if (error)
		dev_put(device);
	return error;
}

static void __exit end(void)
{
	rtnl_lock();
	netdev_rx_handler_unregister(device);
	rtnl_unlock();
	dev_put(device);
}

module_init(start);
module_exit(end);
SPECIMEN("A receive handler that passes all packets on");
