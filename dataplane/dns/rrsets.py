"""The nouns of answers: types and rcodes by number, sets of records, and what there is to say to a question. Pure."""

from typing import NamedTuple

from ..model import Address, ObjectName, format_address
from .names import Labels

A, NS, CNAME, SOA, PTR, HINFO, TXT, AAAA, SRV, HTTPS, ANY = 1, 2, 5, 6, 12, 13, 16, 28, 33, 65, 255
"""Record types by number (IANA, DNS parameters)."""
TYPES = {"A": A, "NS": NS, "CNAME": CNAME, "SOA": SOA, "PTR": PTR, "TXT": TXT, "AAAA": AAAA, "SRV": SRV, "ANY": ANY}
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5

Dependency = ObjectName | Address
"""What an answer was made from: a Service by name, or whoever has an address."""
ZONE = ObjectName("", "")
"""The server itself, which does not change."""


class RRset(NamedTuple):
    """Records of one name and type, as text (RFC 1035 master files)."""

    name: str
    type: str
    ttl: int
    data: tuple[str, ...]


class Found(NamedTuple):
    """What there is to say to a question. NOERROR without an answer is NODATA.

    `zone`: labels of the zone whose SOA goes with a denial. `depends`: () = not to be kept. `alias`: the last name of
    a chain of CNAMEs that leads out of the zone, "" = it does not.
    """

    rcode: int
    zone: Labels
    answer: tuple[RRset, ...] = ()
    additional: tuple[RRset, ...] = ()
    depends: tuple[Dependency, ...] = ()
    alias: str = ""


def address_sets(owner: str, addresses: tuple[Address, ...], ttl: int, types: tuple[int, ...]) -> tuple[RRset, ...]:
    """A and AAAA records of an owner, as far as these types are asked for."""
    found = []
    for qtype, text, width in ((A, "A", 4), (AAAA, "AAAA", 16)):
        data = tuple(format_address(each) for each in addresses if len(each) == width) if qtype in types else ()
        if data:
            found.append(RRset(owner, text, ttl, data))
    return tuple(found)
