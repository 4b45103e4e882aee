/* The body of dnat_hits.c where its hooks cannot be attached, for tests and measurements: as a netfilter program of one
 * network namespace (Linux 6.4), right behind the translation; and over images of kernel structures, run by
 * BPF_PROG_TEST_RUN. See probe_body.py.
 */
#include "dnat_hits.c"

/* ---------------------------------------------------------------------------------------------- behind the translation */

#ifdef HOOK_NETFILTER
int behind_dnat(u64 *ctx) /* struct bpf_nf_ctx: state, skb */
{
	u64 connection = 0;

	if (read(&connection, sizeof(connection), ctx[1] + SKB_NFCT_AT) && (connection & 7) == 2 /* IP_CT_NEW */)
		count_nat(connection & ~7ULL); /* enum ip_conntrack_info is in the low bits */
	return NF_ACCEPT;
}

/* The same without counting: a hook that sees every packet has a cost that the real ones do not have. */
int behind_dnat_empty(u64 *ctx)
{
	u64 connection = 0;

	if (read(&connection, sizeof(connection), ctx[1] + SKB_NFCT_AT) && (connection & 7) == 2)
		asm volatile("" ::: "memory");
	return NF_ACCEPT;
}
#endif

/* ------------------------------------------------------------------------------------------------------------ images */

#ifdef HOOK_IMAGES
struct image {
	u8 bytes[4096];
};

/* An image whose backend is the next of `count`; each run has the cost of this, so it is measured alone too. */
INLINE char *next_image(u32 which, u32 address_at)
{
	u32 turn_key = 0, count_key = 1;
	char *image = LOOKUP(MAP_IMAGES, &which);
	u32 *turn = LOOKUP(MAP_TURN, &turn_key), *count = LOOKUP(MAP_TURN, &count_key);

	if (!image || !turn || !count)
		return 0;
	*turn = *turn + 1 >= *count ? 0 : *turn + 1;
	*(u32 *)(image + address_at) = *turn;
	return image;
}

#ifdef HOOK_NAT
int nat_image(void *skb)
{
	char *image = next_image(0, CT_REPLY_AT + TUPLE_SRC_ADDRESS_AT);

	if (image) {
		*(u64 *)(image + CT_NET_AT) = (u64)image; /* its network namespace: the number stands in here too */
		count_nat((u64)image);
	}
	return 0;
}

int nat_empty(void *skb)
{
	char *image = next_image(0, CT_REPLY_AT + TUPLE_SRC_ADDRESS_AT);

	if (image)
		*(u64 *)(image + CT_NET_AT) = (u64)image;
	return 0;
}
#endif

#ifdef HOOK_IPVS
int ipvs_image(void *skb)
{
	char *image = next_image(1, VS_DADDR_AT);

	if (image) {
		*(u64 *)(image + VS_IPVS_AT) = (u64)image;
		*(u64 *)(image + NETNS_IPVS_NET_AT) = (u64)image;
		count_ipvs((u64)image);
	}
	return 0;
}

int ipvs_empty(void *skb)
{
	char *image = next_image(1, VS_DADDR_AT);

	if (image) {
		*(u64 *)(image + VS_IPVS_AT) = (u64)image;
		*(u64 *)(image + NETNS_IPVS_NET_AT) = (u64)image;
	}
	return 0;
}
#endif
#endif
