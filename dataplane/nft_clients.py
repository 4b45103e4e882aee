"""Who counts as inside the cluster, and what follows: the nftables rules that the options make. Pure.

They stand for the lines @options@, @insiders4@, @insiders6@ and @service_cidrs@ of `nft_tables.nft`, and of the guard
table of ipvs mode.
"""

import re

from msgspec.structs import astuple

from .model import Network, disjoint, parse_network
from .walk import Detection

_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_WORDS = (("ip", 4, 4), ("ip6", 6, 16))


class Clients(Detection, frozen=True):
    """Detection, as rules."""

    @classmethod
    def of(cls, detection: Detection) -> "Clients":
        """The same as rules."""
        return cls(*astuple(detection))

    def rules(self) -> dict[str, list[str]]:
        """The rules by the word that they stand for."""
        return {
            "options": self.masquerade(),
            "service_cidrs": self.unallocated(),
            **{f"insiders{family}": self._insiders(word, family, width) for word, family, width in _WORDS},
        }

    def masquerade(self) -> list[str]:
        """@options@: masquerade clients of a cluster IP."""
        if self.masquerade_all:
            return ['masquerade fully-random comment "everyone (masquerade all)"']
        # whoever is inside in one way is inside
        interfaces = [f"iifname != {pattern}" for pattern in self._interfaces()]
        ranges = {family: [f"{word} saddr != {cidr}" for cidr in self._cidrs(w)] for word, family, w in _WORDS}
        if any(ranges.values()) and interfaces:
            ranges = {family: some or [f"meta nfproto ipv{family}"] for family, some in ranges.items()}
        tests = [" ".join([*some, *interfaces]) for some in ranges.values() if some] or [" ".join(interfaces)]
        return [f'{test} masquerade fully-random comment "a client from outside"' for test in tests if test]

    def _insiders(self, word: str, family: int, width: int) -> list[str]:
        tests = [f"{word} saddr {cidr}" for cidr in self._cidrs(width)]
        tests += [f"iifname {pattern}" for pattern in self._interfaces()]
        return [f'{test} goto lookup_inside{family} comment "a pod"' for test in tests]

    def unallocated(self) -> list[str]:
        """@service_cidrs@: drop what is for a cluster IP that no Service has."""
        rules = []
        for word, _, width in _WORDS:
            cidrs = [str(each) for each in disjoint(self.service_cidrs) if len(each.address) == width]
            if cidrs:
                where = cidrs[0] if len(cidrs) == 1 else f"{{ {', '.join(cidrs)} }}"
                rules.append(f'ct state new {word} daddr {where} drop comment "no Service has this cluster IP"')
        return rules

    def _cidrs(self, width: int) -> list[Network]:
        return [cidr for cidr in self.cluster_cidrs if len(cidr.address) == width]

    def _interfaces(self) -> list[str]:
        patterns = []
        for name, end in ((self.bridge_interface, ""), (self.interface_prefix, "*")):
            if name and not _INTERFACE.fullmatch(name):
                raise ValueError(f"{name!r} is not an interface name")
            patterns += [f'"{name}{end}"'] if name else []
        return patterns


def read_detection(listing: str) -> Detection:
    """The reverse: what the rules of a table say that `nft` has listed."""
    cidrs: dict[str, None] = {}
    interfaces: dict[str, None] = {}
    services: dict[str, None] = {}
    everyone = False
    for line in map(str.strip, listing.splitlines()):
        if found := _POD.match(line):
            if found["range"]:
                cidrs[found["range"]] = None
            else:
                interfaces[found["interface"]] = None
        elif found := _UNALLOCATED.match(line):
            services |= dict.fromkeys(each.strip() for each in found["ranges"].strip("{} ").split(","))
        elif line.startswith("masquerade") and 'comment "everyone (masquerade all)' in line:
            everyone = True
    bridge = next((name for name in interfaces if not name.endswith("*")), "")
    prefix = next((name[:-1] for name in interfaces if name.endswith("*")), "")
    return Detection(everyone, tuple(map(parse_network, cidrs)), bridge, prefix, tuple(map(parse_network, services)))


_POD = re.compile(r'(?:ip6? saddr (?P<range>\S+)|iifname "(?P<interface>[^"]+)") goto lookup_inside[46] comment "a pod')
_UNALLOCATED = re.compile(
    r'ct state new ip6? daddr (?P<ranges>\S+|\{.*\}) drop comment "no Service has this cluster IP'
)
