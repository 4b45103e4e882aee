"""`python -m tests.fuzz_dns COUNT [SEED]`: mutated packets at the answers, as many as asked for.

No exception, no answer larger than allowed, none to an answer, and each in bounded time; what is answered is read by
another library (a sample, since that is slow).
"""

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import dns.exception
import dns.message

from dataplane.dns.answers import Answers, Elsewhere

from .dns_world import answers_of, packet, with_edns

NAMES = (
    *("web.default", "db.data", "db-0.db.data", "_http._tcp.web.default", "none.default", "outside.default"),
    *("second-alias.default", "loop-a.default", "early.data"),
)
TYPES = ("A", "AAAA", "SRV", "PTR", "TXT", "ANY", "CNAME", "SOA")


class Outcome(NamedTuple):
    """Packets, answers, those that another library has read, and the longest processor time of one in seconds."""

    packets: int
    answered: int
    read: int
    slowest: float


def seeds() -> list[bytes]:
    """Packets to begin with."""
    found = []
    for name in NAMES:
        for qtype in TYPES:
            query = packet(f"{name}.svc.cluster.local", qtype)
            found += [query, with_edns(query), with_edns(query, 4096, dnssec_ok=True, options=b"\0\x0a\0\x08abcdefgh")]
    found += [packet("10.0.96.10.in-addr.arpa", "PTR"), packet("cluster.local", "SOA"), packet(".", "NS")]
    return found


def mutated(chance: random.Random, original: bytes, other: bytes) -> bytes:
    """Some bytes changed, left out, doubled, put in, or two packets joined."""
    made = bytearray(original)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(made) + 1)
        match chance.randrange(7):
            case 0 | 1:
                if at < len(made):
                    made[at] = chance.choice((0, 1, 63, 64, 0xC0, 0xFF, chance.randrange(256)))
            case 2:
                if at < len(made):
                    made[at] ^= 1 << chance.randrange(8)
            case 3:
                del made[at : at + chance.randrange(1, 12)]
            case 4:
                made[at:at] = chance.randbytes(chance.randrange(1, 12))
            case 5:
                made[at:at] = made[at : at + chance.randrange(1, 64)]
            case 6:
                made[at:] = other[chance.randrange(len(other) + 1) :]
    return bytes(made)


def fuzz(answers: Answers, count: int, seed: int, *, read_each: int = 50) -> Outcome:
    """Raises AssertionError with the packet for whatever must not be."""
    chance = random.Random(seed)
    originals = seeds()
    answered = read = 0
    slowest = 0.0
    for number in range(count):
        query = mutated(chance, chance.choice(originals), chance.choice(originals))
        udp = number % 8 != 0
        started = time.thread_time()  # of this thread alone: others of the machine may take theirs
        try:
            answer = answers.answer(query, udp=udp)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}; packet {query.hex()}, seed {seed}") from error
        slowest = max(slowest, time.thread_time() - started)
        if answer is None or isinstance(answer, Elsewhere):
            continue
        answered += 1
        assert not query[2] & 0x80, query.hex()
        assert answer[:2] == query[:2], query.hex()
        assert answer[2] & 0x80, query.hex()
        assert len(answer) <= (1232 if udp else 65535), query.hex()
        if udp and int.from_bytes(query[10:12]) == 0:
            assert len(answer) <= 512, query.hex()
        if number % read_each == 0:
            try:
                dns.message.from_wire(answer)
            except dns.exception.DNSException as error:
                raise AssertionError(f"{error!r} of the answer to {query.hex()}") from error
            read += 1
    return Outcome(count, answered, read, slowest)


def main() -> None:
    """From the command line."""
    count = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        outcome = fuzz(answers_of(Path(folder)), count, seed)
    took = time.perf_counter() - started
    print(
        f"seed {seed}: {outcome.packets:,} packets in {took:.0f} s, {outcome.answered:,} answered, "
        f"{outcome.read:,} read by another library, slowest {outcome.slowest * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    main()
