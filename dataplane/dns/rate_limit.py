"""Response rate limiting: so many answers a second for one client over UDP, whose address may be a lie.

Over the limit most queries get nothing, and one of some gets an empty answer with TC, by which a client that is really
there comes back over TCP (BIND calls that slip). Pure; the caller has the clock.
"""

SLIP = 8
"""Of so many queries over the limit one is told to come back over TCP."""
PASS, DROP, TRUNCATE = 0, 1, 2


class RateLimit:
    """Counts of one second. `limit`: answers a second for one address (IPv6: one /64), 0 = no limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.dropped = 0
        self.truncated = 0
        self._second = 0
        self._counts: dict[bytes, int] = {}

    def second(self, now: float) -> None:
        """Before each batch: a new second forgets the last one, and with it all that made addresses up."""
        second = int(now)
        if second != self._second:
            self._second = second
            self._counts = {}

    def judge(self, address: bytes) -> int:
        """PASS, DROP or TRUNCATE."""
        counts = self._counts
        client = address[:8]
        counts[client] = count = counts.get(client, 0) + 1
        if count <= self.limit:
            return PASS
        if count % SLIP:
            self.dropped += 1
            return DROP
        self.truncated += 1
        return TRUNCATE
