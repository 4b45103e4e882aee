"""One ServicePort in rules: which chains its virtual servers share, and every rule of them. Pure.

A group is the virtual servers of one ServicePort (one label and protocol) in one family; what is at one address and
port is a site. As in kube-proxy the sites of a group share KUBE-SVC (its endpoints), KUBE-SVL (those of this node),
KUBE-EXT, KUBE-FW and the KUBE-SEP chains, and with these the memory of affinity. A site that needs other content than
the rest (for a moment, or because two Services have one name) gets chains of names of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .iptables_text import (
    EXTERNAL_SERVICES,
    FIREWALL,
    MARK,
    MARK_CLIENTS,
    MARK_MASQ,
    NODEPORTS,
    PORTAL_WORDS,
    PROTOCOLS,
    REFUSAL_WORDS,
    SERVICES,
    Form,
    Rules,
    chain_name,
    comment,
    own_seed,
    plain_label,
    reject,
    service_text,
    shares,
    to_address,
)
from .model import (
    Forwarding,
    Kind,
    Masquerade,
    NoServers,
    RealServer,
    VirtualAddress,
    VirtualServer,
    family_of,
    format_endpoint,
)

LOCAL = "-m addrtype --src-type LOCAL"
"""The match of processes of this node."""

ChainKey = tuple[str, str]
"""Table and chain."""


class Line(NamedTuple):
    """A rule in a chain that all Services share, and whose it is."""

    chain: ChainKey
    at: VirtualAddress
    rule: str


class Site(NamedTuple):
    """What is at one address and port: the server for everybody, and the one for clients inside the cluster.

    `text`: what comments call it. `seed`: what its chains are named after. `pool`: where the endpoints of the one for
    everybody are, SVC or SVL.
    """

    outside: VirtualServer | None
    inside: VirtualServer | None
    text: str = ""
    seed: str = ""
    pool: str = "SVC"

    @property
    def any(self) -> VirtualServer:
        """One of the two: their label, kind, address and port are the same."""
        server = self.outside or self.inside
        assert server is not None
        return server

    @property
    def plain(self) -> bool:
        """A cluster IP without more: its rule in KUBE-SERVICES leads to its endpoints at once."""
        return self.any.kind is Kind.CLUSTER_IP and self.inside is None and not self.any.allowed

    @property
    def reals(self) -> tuple[RealServer, ...]:
        """The endpoints for everybody."""
        return self.outside.real_servers if self.outside else ()

    @property
    def serving(self) -> bool:
        """Some endpoint takes everybody's new connections."""
        return any(real.weight for real in self.reals)

    @property
    def led(self) -> bool:
        """Some packets to it are sent to endpoints."""
        return bool(self.reals) or self.inside is not None


class Rendered(NamedTuple):
    """A group in rules: those in shared chains, its own chains, and which virtual addresses use each of these.

    Of a group with a single site nothing is said in `users`.
    """

    lines: list[Line]
    chains: dict[ChainKey, Rules]
    users: dict[ChainKey, list[VirtualAddress]]


def group_of(form: Form, server: VirtualServer) -> str:
    """What tells groups apart: the usual seed of their chains' names, as in kube-proxy."""
    return service_text(form, server.at, server.label) + PROTOCOLS[server.at.protocol]


def express(form: Form, server: VirtualServer) -> VirtualServer:
    """The server as rules can hold it and tell it back: what rules have no way to say takes its default."""
    reals = server.real_servers
    for real in reals:
        if real.local or real.forwarding is not Forwarding.MASQ or real.upper_threshold or real.lower_threshold:
            reals = tuple(RealServer(real.address, real.port, real.weight) for real in reals)
            break
    masquerade = server.masquerade if reals else Masquerade.DETECT
    if masquerade is Masquerade.ALWAYS and form.everyone and server.kind is Kind.CLUSTER_IP:
        masquerade = Masquerade.DETECT
    inside = server.at.inside
    allowed = server.allowed
    if allowed and (inside or any(each.prefix == 0 for each in allowed)):
        allowed = ()
    return VirtualServer(
        server.at,
        reals,
        persistence=server.persistence and (server.persistence if any(real.weight for real in reals) else 0),
        masquerade=Masquerade.NODE if inside else masquerade,
        no_servers=NoServers.REJECT if reals or inside else server.no_servers,
        bound=False,
        label=plain_label(server.label),
        kind=server.kind,
        allowed=allowed,
    )


# ------------------------------------------------------------------------------------------------- arrangement


def plain_site(group: str, server: VirtualServer) -> Site | None:
    """What `arrange` makes of the only server of a group, if that is plain and has endpoints."""
    at = server.at
    if server.kind is not Kind.CLUSTER_IP or at.inside or server.allowed or not server.real_servers:
        return None
    return Site(server, None, group.removesuffix(PROTOCOLS[at.protocol]), group)


def arrange(form: Form, servers: Iterable[VirtualServer]) -> list[Site]:
    """The sites of one group with the names of their chains; the same for the same servers, in whatever order."""
    servers = list(servers)
    if not servers:
        return []
    text = service_text(form, servers[0].at, servers[0].label)
    usual = text + PROTOCOLS[servers[0].at.protocol]
    if len(servers) == 1 and servers[0].kind is Kind.CLUSTER_IP and not servers[0].at.inside:
        return [Site(servers[0], None, text, usual)]  # by far the commonest
    pairs: dict[tuple[int, bytes, int], list[VirtualServer | None]] = {}
    for server in servers:
        pairs.setdefault(server.at[:3], [None, None])[server.at.inside] = server
    sites = [Site(pairs[where][False], pairs[where][True], text, usual) for where in sorted(pairs)]
    mixed = not all(site.plain for site in sites)
    # external ones first: what they leave is a cluster IP's (KUBE-SVL, with internalTrafficPolicy Local)
    sites.sort(key=lambda site: site.plain)
    taken: dict[str, object] = {}
    arranged = []
    for site in sites:
        if site.plain:
            pools = ("SVC", "SVL") if mixed else ("SVC",)
        else:
            local = site.inside is not None or site.any.masquerade is Masquerade.NODE
            pools = ("SVL" if local else "SVC",)
        for pool in pools:
            claims = _claims(site, pool)
            if all(taken.get(name, claim) == claim for name, claim in claims.items()):
                taken.update(claims)
                arranged.append(site._replace(pool=pool))
                break
        else:
            arranged.append(site._replace(seed=own_seed(usual, site.any.at), pool=pools[0]))
    return arranged


def _claims(site: Site, pool: str) -> dict[str, object]:
    """What a site needs chains of a name to hold. KUBE-SEP is as many want it: more remembering does no harm."""
    claims: dict[str, object] = {}
    outside, inside = site.outside, site.inside
    if outside and outside.real_servers:
        claims[pool] = outside.real_servers, outside.persistence
    if site.plain:
        return claims
    if inside:
        claims["SVC"] = inside.real_servers, inside.persistence
    allowed = outside.allowed if outside else ()
    if site.led:
        claims["EXT"] = inside is not None, pool if site.reals else "", outside.masquerade if outside else None
        if allowed:
            claims["FW"] = allowed, site.any.kind
    if allowed and not site.serving:
        claims["FW in filter"] = allowed
    return claims


# --------------------------------------------------------------------------------------------------- rendering


def lines_of(form: Form, site: Site) -> Iterator[Line]:
    """The rules of a site in shared chains."""
    server, outside = site.any, site.outside
    at = server.at._replace(inside=False) if server.at.inside else server.at
    text = site.text
    if site.led:
        target = site.pool if site.plain else "FW" if server.allowed else "EXT"
        chain = NODEPORTS if server.kind is Kind.NODE_PORT else SERVICES
        yield Line(("nat", chain), at, portal(site, chain_name(target, site.seed)))
    if outside is None:
        return
    # of a cluster IP, what went to nobody is refused with its closed ports
    if not outside.real_servers or not (site.serving or server.kind is Kind.CLUSTER_IP):
        chain = SERVICES if server.kind is Kind.CLUSTER_IP else EXTERNAL_SERVICES
        yield Line(("filter", chain), at, refusal(form, outside))
    if outside.allowed:
        firewall = chain_name("FW", site.seed)
        # who was let through is refused, if that is what a Service without endpoints does
        target = "DROP" if site.serving else firewall
        words = f"{text} traffic not accepted by {firewall}"
        yield Line(("filter", FIREWALL), at, f"{to_address(at, words)} -j {target}")


def portal(site: Site, chain: str) -> str:
    """The rule that leads what is sent to a site to a chain of it."""
    return f"{to_address(site.any.at, f'{site.text}{PORTAL_WORDS[site.any.kind]}')} -j {chain}"


def refusal(form: Form, server: VirtualServer) -> str:
    """The rule for a server without real servers."""
    at = server.at
    text = f"{service_text(form, at, server.label)}{REFUSAL_WORDS[server.kind]}"
    if server.no_servers is NoServers.DROP:
        return f"{to_address(at, f'{text} has no local endpoints')} -j DROP"
    return f"{to_address(at, f'{text} has no endpoints')} -j {reject(at.address)}"


def render(form: Form, servers: Iterable[VirtualServer]) -> Rendered:
    """Every rule of one group, as iptables-save prints them."""
    sites = arrange(form, servers)
    found = Rendered([], {}, {})
    if not sites:
        return found
    several = len(sites) > 1
    ends: dict[str, tuple[str, bool]] = {}
    for site in sites:
        found.lines.extend(lines_of(form, site))
        if not site.plain:
            for key, rules in _external_chains(form, site):
                found.chains[key] = rules
                if several:
                    _use(found, key, site.outside, site.inside)
        for pool, server in ((site.pool, site.outside), ("SVC", site.inside)):
            if server is None or not (server.real_servers or server.at.inside):
                continue
            key = "nat", chain_name(pool, site.seed)
            if several:
                _use(found, key, server)
            clients = client_rules(form, server, site.text) if site.plain else ()
            if key in found.chains:  # a second one: what differs is its own clients at most
                found.chains[key] = (*clients, *found.chains[key])
                continue
            texts = [format_endpoint(real.address, real.port) for real in server.real_servers]
            seps = [chain_name("SEP", f"{site.seed}{text}") for text in texts]
            found.chains[key] = (*clients, *balance(form, server, site.text, texts, seps))
            for real, text, sep in zip(server.real_servers, texts, seps, strict=True):
                remembers = bool(server.persistence and real.weight)
                ends[sep] = text, remembers or (sep in ends and ends[sep][1])
                if several:
                    _use(found, ("nat", sep), server)
    for sep, rules in endpoint_rules(form, sites[0], ((sep, *end) for sep, end in ends.items())):
        found.chains["nat", sep] = rules
    return found


def _use(found: Rendered, key: ChainKey, *servers: VirtualServer | None) -> None:
    found.users.setdefault(key, []).extend([server.at for server in servers if server])


def client_rules(form: Form, server: VirtualServer, text: str) -> Rules:
    """The rule at a cluster IP that marks clients to be masqueraded, if there is one."""
    if server.masquerade is Masquerade.DETECT and not form.tells:
        return ()
    words = f"{text} cluster IP"
    return tuple(f"{_to_from(server.at, words, match)} -j {target}" for match, target in _masqueraded(form, server))


def _to_from(at: VirtualAddress, words: str, match: str) -> str:
    """The matches of a rule for a VIP and some clients, each in its place."""
    if match.startswith("! -s "):
        return to_address(at, words, source=match)
    if match.startswith("! -i "):
        return to_address(at, words, device=match)
    return f"{to_address(at, words)} {match}".rstrip()


def _masqueraded(form: Form, server: VirtualServer) -> Iterator[tuple[str, str]]:
    """Which clients are masqueraded by a server: matches, and where such packets go."""
    if server.masquerade is Masquerade.NODE:
        yield LOCAL, MARK_MASQ
    elif server.masquerade is Masquerade.ALWAYS or form.everyone:
        yield "", MARK_MASQ
    elif insiders := form.insiders(family_of(server.at.address)):
        yield (f"! {insiders[0]}", MARK_MASQ) if len(insiders) == 1 else ("", MARK_CLIENTS)


def _external_chains(form: Form, site: Site) -> Iterator[tuple[ChainKey, Rules]]:
    """KUBE-FW and KUBE-EXT of a site."""
    server, text = site.any, site.text
    firewall, external = chain_name("FW", site.seed), chain_name("EXT", site.seed)
    allowed = server.allowed
    if allowed and site.led:
        words = comment(f"{text}{PORTAL_WORDS[server.kind]}")
        last = comment(f"other traffic to {text} will be dropped by {FIREWALL}")
        yield ("nat", firewall), (*(f"-s {each} {words} -j {external}" for each in allowed), last)
    if allowed and not site.serving:
        yield ("filter", firewall), (*(f"-s {each} -j RETURN" for each in allowed), "-j DROP")
    if site.led:
        yield ("nat", external), tuple(external_rules(form, site))


def external_rules(form: Form, site: Site) -> Iterator[str]:
    """KUBE-EXT: clients inside the cluster may use every endpoint, whatever the policy for the others is."""
    server = site.any
    words = f"{site.text} external destinations"
    everywhere = chain_name("SVC", site.seed)
    if site.inside:
        for each in form.insiders(family_of(server.at.address)):
            yield f"{each} {comment(f'pod traffic for {words}')} -j {everywhere}"
    if site.inside or (site.outside and site.outside.masquerade is Masquerade.NODE):
        yield f"{comment(f'masquerade LOCAL traffic for {words}')} {LOCAL} -j {MARK_MASQ}"
    if site.inside:
        yield f"{comment(f'route LOCAL traffic for {words}')} {LOCAL} -j {everywhere}"
    if site.outside is None or not site.reals:
        return
    if site.outside.masquerade is not Masquerade.NODE:
        for match, target in _masqueraded(form, site.outside):
            yield f"{match} {comment(f'masquerade traffic for {words}')} -j {target}".lstrip()
    # kube-proxy has no such comment, and no external address whose clients are masqueraded as a cluster IP's are
    told = f"{comment(words)} " if site.outside.masquerade is Masquerade.DETECT else ""
    yield f"{told}-j {chain_name(site.pool, site.seed)}"


def balance(form: Form, server: VirtualServer, text: str, ends: Sequence[str], seps: Sequence[str]) -> Iterator[str]:
    """KUBE-SVC and KUBE-SVL: who came lately goes where he was, anybody else by chance."""
    reals = server.real_servers
    if server.persistence:
        mask = _mask(server.at)
        for real, end, sep in zip(reals, ends, seps, strict=True):
            if real.weight:
                yield (
                    f"{comment(_arrow(form, text, real, end))} -m recent --rcheck --seconds {server.persistence} "
                    f"--reap --name {sep} --mask {mask} --rsource -j {sep}"
                )
    for real, end, sep, share in zip(reals, ends, seps, shares(form, reals), strict=True):
        yield f"{comment(_arrow(form, text, real, end))}{share} -j {sep}"


def endpoint_rules(
    form: Form, site: Site, ends: Iterable[tuple[str, str, bool]]
) -> Iterator[tuple[str, tuple[str, str]]]:
    """KUBE-SEP of each endpoint, given as its chain, where it is, and whether its clients are remembered."""
    at = site.any.at
    words, protocol, mask = comment(site.text), PROTOCOLS[at.protocol], _mask(at)
    width = 8 * len(at.address)
    hairpin = f"/{width} {words} -j " + (f"MARK --set-xmark {MARK}/{MARK}" if form.classic else MARK_MASQ)
    to = f" -m {protocol} -j DNAT --to-destination "
    for sep, end, remembers in ends:
        remember = f" -m recent --set --name {sep} --mask {mask} --rsource" if remembers else ""
        host = end[: end.rindex(":")].strip("[]")
        yield sep, (f"-s {host}{hairpin}", f"-p {protocol} {words}{remember}{to}{end}")


def _mask(at: VirtualAddress) -> str:
    return "255.255.255.255" if len(at.address) == 4 else "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"


def _arrow(form: Form, text: str, real: RealServer, end: str) -> str:
    weight = f" weight {real.weight}" if real.weight != 1 else ""
    return text + weight if form.classic else f"{text} -> {end}{weight}"
