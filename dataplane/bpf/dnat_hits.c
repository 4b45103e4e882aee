/* Hits per backend: new connections whose destination was translated from a virtual server's address to a backend.
 *
 * Hooks, each when the function has returned, so that only what succeeded counts:
 *   nf_nat_setup_info(ct, range, maniptype)   nftables and iptables; the conntrack entry tells both ends
 *   ip_vs_schedule(svc, skb, pd, ignored, iph)  IPVS; it returns the new connection, with and without persistence
 * by fexit where the kernel takes that, else by kretprobe. Established connections pass neither function.
 *
 * A hit costs a look into `ids` and an atomic addition. The first one of a backend takes a free slot; user space is not
 * asked, and learns of it by reading the slots, which are mapped into its memory. When nothing can be counted, that is
 * counted (`losses`).
 *
 * No kernel headers: offsets (*_AT, *_FROM, *_TO) are read from the running kernel's BTF (sysfs_btf.py) and compiled in.
 * BCC is the compiler only: maps are helper calls with numbers in place of descriptors, which bpf_syscall.py puts in.
 */
#include "dnat_hits.h"

#define INLINE static __attribute__((always_inline)) inline
#define MAP(number) ((void *)bpf_pseudo_fd(1, number))
#define LOOKUP(number, key) bpf_map_lookup_elem(MAP(number), key)
#define AF_INET 2
#define NF_ACCEPT 1
#define NF_NAT_MANIP_DST 1
#define IPS_CONFIRMED (1 << 3) /* linux/netfilter/nf_conntrack_common.h */
#define IPS_DST_NAT (1 << 5)
#define BPF_ANY 0
#define BPF_NOEXIST 1
#define EEXIST 17

INLINE void lose(u32 reason)
{
	u64 *count = LOOKUP(MAP_LOSSES, &reason);

	if (count)
		__sync_fetch_and_add(count, 1);
}

INLINE int read(void *to, u32 size, u64 from)
{
	if (bpf_probe_read_kernel(to, size, (void *)from) == 0)
		return 1;
	lose(LOST_READ);
	return 0;
}

INLINE int is_ours(u64 net)
{
	u32 zero = 0, inum;
	struct config *config = LOOKUP(MAP_CONFIG, &zero);

	return config && read(&inum, sizeof(inum), net + NET_INUM_AT) && inum == config->netns;
}

/* The slot of a key that has none yet; 0 when it is not ours to count or cannot be counted. */
INLINE struct slot *new_slot(struct hit_key *key)
{
	struct frontend_key frontend = {};
	struct slot *slot;
	u32 id, *other;
	long refused;

	frontend.family = key->family;
	frontend.protocol = key->protocol;
	frontend.port = key->port;
	__builtin_memcpy(frontend.address, key->address, 16);
	if (!LOOKUP(MAP_FRONTENDS, &frontend))
		return 0; /* somebody else's NAT */
	if (bpf_map_pop_elem(MAP(MAP_FREE), &id)) {
		other = LOOKUP(MAP_IDS, key); /* the last slot may just have become this key's */
		if (other)
			return LOOKUP(MAP_SLOTS, other);
		lose(LOST_FULL);
		return 0;
	}
	refused = bpf_map_update_elem(MAP(MAP_IDS), key, &id, BPF_NOEXIST);
	if (refused) {
		bpf_map_push_elem(MAP(MAP_FREE), &id, BPF_ANY);
		other = refused == -EEXIST ? LOOKUP(MAP_IDS, key) : 0; /* another processor was first: use its slot */
		if (other)
			return LOOKUP(MAP_SLOTS, other);
		lose(LOST_INSERT);
		return 0;
	}
	slot = LOOKUP(MAP_SLOTS, &id);
	if (!slot) {
		lose(LOST_INSERT); /* cannot happen: ids are indices of slots */
		return 0;
	}
	__builtin_memcpy(slot->key.address, key->address, 16);
	__builtin_memcpy(slot->key.backend, key->backend, 16);
	asm volatile("" ::: "memory");
	*(volatile u64 *)&slot->key = *(u64 *)key;
	return slot;
}

INLINE void count(struct hit_key *key)
{
	u32 *id = LOOKUP(MAP_IDS, key);
	struct slot *slot = id ? LOOKUP(MAP_SLOTS, id) : new_slot(key);

	if (slot)
		__sync_fetch_and_add(&slot->hits, 1);
}

INLINE void copy_address(u8 *to, char *from, u8 family)
{
	if (family == AF_INET) /* the rest of the union may be anything */
		*(u32 *)to = *(u32 *)from;
	else
		__builtin_memcpy(to, from, 16);
}

/* ------------------------------------------------------------------------------------------------------- netfilter */

#ifdef HOOK_NAT
#define CT_SIZE (CT_TO - CT_FROM)
_Static_assert(CT_FROM % 8 == 0 && CT_SIZE <= 256, "the parts of struct nf_conn that are read fit on the stack");
#define CT(type, at) (*(type *)(copy + (at) - CT_FROM))

/* `ct`, a struct nf_conn, as a translation has left it: the original direction tells what was asked for, the reply
 * direction who answers. The address that rules ask for (`range`) may be a choice of several. */
INLINE void count_nat(u64 ct)
{
	char copy[CT_SIZE] __attribute__((aligned(8)));
	struct hit_key key = {};

	if (!read(copy, CT_SIZE, ct + CT_FROM))
		return;
	if ((CT(u64, CT_STATUS_AT) & (IPS_DST_NAT | IPS_CONFIRMED)) != IPS_DST_NAT)
		return;
	if (!is_ours(CT(u64, CT_NET_AT)))
		return;
	key.family = CT(u8, CT_ORIGINAL_AT + TUPLE_FAMILY_AT);
	key.protocol = CT(u8, CT_ORIGINAL_AT + TUPLE_PROTOCOL_AT);
	key.port = CT(u16, CT_ORIGINAL_AT + TUPLE_DST_PORT_AT);
	key.backend_port = CT(u16, CT_REPLY_AT + TUPLE_SRC_PORT_AT);
	copy_address(key.address, &CT(char, CT_ORIGINAL_AT + TUPLE_DST_ADDRESS_AT), key.family);
	copy_address(key.backend, &CT(char, CT_REPLY_AT + TUPLE_SRC_ADDRESS_AT), key.family);
	count(&key);
}

#ifdef HOOK_FEXIT
int nat_fexit(u64 *ctx) /* the arguments, then the result */
{
	if ((u32)ctx[2] == NF_NAT_MANIP_DST && (u32)ctx[NAT_ARGUMENTS] == NF_ACCEPT)
		count_nat(ctx[0]);
	return 0;
}
#endif
#endif

/* ------------------------------------------------------------------------------------------------------------ IPVS */

#ifdef HOOK_IPVS
#define VS_SIZE (VS_TO - VS_FROM)
_Static_assert(VS_FROM % 8 == 0 && VS_SIZE <= 256, "the parts of struct ip_vs_conn that are read fit on the stack");
#define VS(type, at) (*(type *)(copy + (at) - VS_FROM))

/* `cp`, a struct ip_vs_conn that was just made. */
INLINE void count_ipvs(u64 cp)
{
	char copy[VS_SIZE] __attribute__((aligned(8)));
	struct hit_key key = {};
	u64 net;

	if (!read(copy, VS_SIZE, cp + VS_FROM))
		return;
	if (!read(&net, sizeof(net), VS(u64, VS_IPVS_AT) + NETNS_IPVS_NET_AT) || !is_ours(net))
		return;
	key.family = VS(u16, VS_AF_AT);
	key.protocol = VS(u16, VS_PROTOCOL_AT);
	key.port = VS(u16, VS_VPORT_AT);
	key.backend_port = VS(u16, VS_DPORT_AT);
	copy_address(key.address, &VS(char, VS_VADDR_AT), key.family);
	copy_address(key.backend, &VS(char, VS_DADDR_AT), key.family);
	count(&key);
}

#ifdef HOOK_FEXIT
int ipvs_fexit(u64 *ctx)
{
	if (ctx[IPVS_ARGUMENTS])
		count_ipvs(ctx[IPVS_ARGUMENTS]);
	return 0;
}
#endif
#endif

/* --------------------------------------------------------------------- kprobes, for kernels that refuse fexit */

#ifdef HOOK_KRETPROBE
#include <uapi/linux/ptrace.h>

#ifdef HOOK_NAT
/* What a call was given has to be kept until it returns: under the address of its return address on the stack, which no
 * other call that is still running has, whether an interrupt or another processor made it. */
int nat_kprobe(struct pt_regs *ctx)
{
	u64 frame = ctx->sp, ct = ctx->di;

	if ((u32)ctx->dx != NF_NAT_MANIP_DST)
		bpf_map_delete_elem(MAP(MAP_PARKED), &frame);
	else if (bpf_map_update_elem(MAP(MAP_PARKED), &frame, &ct, BPF_ANY))
		lose(LOST_FULL);
	return 0;
}

int nat_kretprobe(struct pt_regs *ctx)
{
	u64 frame = ctx->sp - sizeof(u64), ct, *parked = LOOKUP(MAP_PARKED, &frame);

	if (!parked) { /* the return address is popped; some kernels push another one before they look at sp */
		frame = ctx->sp;
		parked = LOOKUP(MAP_PARKED, &frame);
	}
	if (!parked)
		return 0;
	ct = *parked;
	bpf_map_delete_elem(MAP(MAP_PARKED), &frame);
	if ((u32)ctx->ax == NF_ACCEPT)
		count_nat(ct);
	return 0;
}
#endif

#ifdef HOOK_IPVS
int ipvs_kretprobe(struct pt_regs *ctx)
{
	if (ctx->ax)
		count_ipvs(ctx->ax);
	return 0;
}
#endif
#endif
