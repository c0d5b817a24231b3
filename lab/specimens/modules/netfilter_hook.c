// SPDX-License-Identifier: GPL-2.0-only OR MIT
/* A netfilter hook for incoming packets that lets all pass. */
#include "specimen.h"
#include <linux/netfilter.h>
#include <linux/netfilter_ipv4.h>
#include <net/net_namespace.h>

static unsigned int pass(void *data, struct sk_buff *packet,
			 const struct nf_hook_state *state)
{
	return NF_ACCEPT;
}

static const struct nf_hook_ops hook = {
	.hook = pass,
	.pf = NFPROTO_IPV4,
	.hooknum = NF_INET_LOCAL_IN,
	.priority = NF_IP_PRI_FIRST,
};

static int __init start(void)
{
	int error = specimen_in_lab();

	return error ? error : nf_register_net_hook(&init_net, &hook);
}

static void __exit end(void)
{
	nf_unregister_net_hook(&init_net, &hook);
}

module_init(start);
module_exit(end);
SPECIMEN("A netfilter hook that lets all pass");
