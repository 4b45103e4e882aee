/* What the probe's programs and user space share: keys and values of the maps, with every pad spelled out.
 *
 * records.py declares the same structures. Its sizes and offsets, and the numbers of maps and losses, are compiled in as
 * -D macros (*_SIZE, *_AT, MAP_*, LOST_*) and asserted here, so the two cannot drift apart.
 * Addresses and ports are in network byte order; an IPv4 address is followed by twelve zeros.
 */
#define OFFSET(type, member) __builtin_offsetof(type, member)

/* Of this network namespace only (its inode number in nsfs). */
struct config {
	u32 netns;
	u32 pad;
};

/* A virtual server's address: connections to others are not counted. */
struct frontend_key {
	u8 family; /* AF_INET, AF_INET6 */
	u8 protocol;
	u16 port;
	u32 pad;
	u8 address[16];
};

/* One way that connections take. Its first eight bytes are never all zero. */
struct hit_key {
	u8 family;
	u8 protocol;
	u16 port;
	u16 backend_port;
	u16 pad;
	u8 address[16];
	u8 backend[16];
};

/* A counter and whose it is: one cache line, in an array that user space has mapped into its memory. The first eight bytes
 * of the key are written last: where they are zero nothing else means anything. */
struct slot {
	struct hit_key key;
	u64 hits;
	u64 pad[2];
};

_Static_assert(sizeof(struct config) == CONFIG_SIZE, "struct config");
_Static_assert(sizeof(struct frontend_key) == FRONTEND_KEY_SIZE, "struct frontend_key");
_Static_assert(OFFSET(struct frontend_key, address) == FRONTEND_ADDRESS_AT, "struct frontend_key");
_Static_assert(sizeof(struct hit_key) == HIT_KEY_SIZE, "struct hit_key");
_Static_assert(OFFSET(struct hit_key, address) == HIT_ADDRESS_AT, "struct hit_key");
_Static_assert(OFFSET(struct hit_key, backend) == HIT_BACKEND_AT, "struct hit_key");
_Static_assert(sizeof(struct slot) == SLOT_SIZE, "struct slot");
_Static_assert(OFFSET(struct slot, hits) == SLOT_HITS_AT, "struct slot");
