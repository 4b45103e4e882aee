"""Who counts as inside the cluster, and what follows: the nftables rules that the options make. Pure.

They stand for the lines @options@, @insiders4@, @insiders6@ and @service_cidrs@ of `nft_tables.nft`, and of the guard
table of ipvs mode.
"""

import re

from msgspec import Struct

from .model import Network, disjoint

_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_WORDS = (("ip", 4, 4), ("ip6", 6, 16))


class Clients(Struct, frozen=True):
    """Whom `Masquerade.DETECT` masquerades: everyone, else clients that are not inside by CIDR or by interface; with
    none of these set, nobody but the node's own processes."""

    masquerade_all: bool = False
    cluster_cidrs: tuple[Network, ...] = ()
    bridge_interface: str = ""
    """Clients behind it are inside (kube-proxy's detect-local BridgeInterface)."""
    interface_prefix: str = ""
    """Clients behind interfaces that begin so are inside (InterfaceNamePrefix)."""
    service_cidrs: tuple[Network, ...] = ()
    """Where cluster IPs come from."""

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
        tests = []
        for word, _, width in _WORDS:
            tests.append(" ".join(f"{word} saddr != {cidr}" for cidr in self._cidrs(width)))
        tests += [f"iifname != {pattern}" for pattern in self._interfaces()]
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
