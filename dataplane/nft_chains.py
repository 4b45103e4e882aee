"""The chains of nftables mode that are made when a Service first needs them, as text and as netlink messages. Pure.

    pick4_3           the index is random below 3
    draw4_3           the same, and from the index to an endpoint's number
    sticky4_10800_3   the number this client had, if that endpoint is alive, else a new one
    inside_…          the same among the endpoints for clients inside the cluster
    local_…           clients inside the cluster to inside4, the others to the chain of the rest of the name
    keep4_10800       affinity4 keeps what is there, and its clock starts again
    renew4_10800      affinity4 takes the new number

None of them names a map of endpoints: the kernel walks a whole map for each rule that is bound to it
(nf_tables_bind_set: 2 ms among 30,000 elements, 20 ms among 120,000; a chain like these: 25 us among any number), and
checks each new element against every such rule (256 rules: twice the time to load). `keep` and `renew` name the map of
clients; there is a pair for each affinity time in use, and the API server's default is nearly always the only one.
`nft` 1.0.6 itself runs out of registers on the masks of `update`, but lists them well.
"""

import hashlib
from typing import NamedTuple

from . import nftables_messages as nft
from .netlink_socket import NLM_F_CREATE, NLM_F_EXCL
from .nft_layout import HOME_BITS, INSIDE, NUMBER_BITS, TABLE, Parts, chain_parts
from .nlattr import NlAttrs, attr, be32, be64, blob, cstring, header, padding, u32_bytes

_APPEND = 0x800
_MARK = "made on demand"
_GOTO, _JUMP = -4, -3
_NOT_EQUAL = 1
_L4PROTO, _PRIORITY, _NFPROTO = 16, 2, 15  # NFT_META_*
_DYNSET_UPDATE, _DYNSET_DELETE = 1, 2


class _Payload(NlAttrs):
    """NFTA_PAYLOAD_*."""

    dreg = attr(1, be32)
    base = attr(2, be32)
    offset = attr(3, be32)
    len = attr(4, be32)


class _Meta(NlAttrs):
    """NFTA_META_*."""

    dreg = attr(1, be32)
    key = attr(2, be32)
    sreg = attr(3, be32)


class _Cmp(NlAttrs):
    """NFTA_CMP_*."""

    sreg = attr(1, be32)
    op = attr(2, be32)
    data = attr(3, blob)


class _Numgen(NlAttrs):
    """NFTA_NG_*; type 1 is random."""

    dreg = attr(1, be32)
    modulus = attr(2, be32)
    type = attr(3, be32)
    offset = attr(4, be32)


class _Bitwise(NlAttrs):
    """NFTA_BITWISE_*; mask and xor are nested data (4 and 5)."""

    sreg = attr(1, be32)
    dreg = attr(2, be32)
    len = attr(3, be32)


class _Dynset(NlAttrs):
    """NFTA_DYNSET_*; the timeout in milliseconds."""

    set = attr(1, cstring)
    op = attr(3, be32)
    key = attr(4, be32)
    data = attr(5, be32)
    timeout = attr(6, be64)


class _Immediate(NlAttrs):
    """NFTA_IMMEDIATE_*; register 0 is the verdict."""

    dreg = attr(1, be32)
    data = attr(2, blob)


class _Expression(NlAttrs):
    """NFTA_EXPR_*."""

    name = attr(1, cstring)
    data = attr(2, blob)


def _expression(name: str, data: bytes) -> bytes:
    inner = _Expression.encode(name=name) + _nested(2, data)
    return _nested(1, inner)


def _nested(number: int, payload: bytes) -> bytes:
    return header(len(payload), number | 0x8000) + payload + padding(len(payload))


def _verdict(code: int, chain: str) -> bytes:
    told = nft.VerdictAttrs.encode(code=code & 0xFFFF_FFFF, chain=chain)
    return _expression("immediate", _Immediate.encode(dreg=0) + _nested(2, _nested(2, told)))


def _compare(register: int, operation: int, value: bytes) -> bytes:
    data = nft.DataAttrs.encode(value=value)
    return _expression("cmp", _Cmp.encode(sreg=register, op=operation) + _nested(3, data))


def _random(count: int, first: int) -> list[bytes]:
    offset = {"offset": first} if first else {}
    return [
        _expression("numgen", _Numgen.encode(dreg=8, modulus=count, type=1, **offset)),
        _expression("meta", _Meta.encode(key=_PRIORITY, sreg=8)),
    ]


def _masked(register: int, mask: int) -> list[bytes]:
    """The priority, with a mask, in a register."""
    told = _Bitwise.encode(sreg=register, dreg=register, len=4)
    told += _nested(4, nft.DataAttrs.encode(value=u32_bytes(mask)))
    told += _nested(5, nft.DataAttrs.encode(value=u32_bytes(0)))
    return [_expression("meta", _Meta.encode(dreg=register, key=_PRIORITY)), _expression("bitwise", told)]


def _affinity(family: int, operation: int, seconds: int) -> list[bytes]:
    """Client and Service port in registers from 8 on, the endpoint's number behind them."""
    offset, width = (12, 4) if family == 4 else (8, 16)
    home = 8 + width // 4
    load = [
        _expression("meta", _Meta.encode(dreg=8, key=_NFPROTO)),
        _compare(8, 0, bytes((nft.IP if family == 4 else nft.IP6,))),
        _expression("payload", _Payload.encode(dreg=8, base=1, offset=offset, len=width)),
        *_masked(home, HOME_BITS),
        *_masked(home + 1, HOME_BITS | NUMBER_BITS),
    ]
    timeout = {"timeout": seconds * 1000} if operation == _DYNSET_UPDATE else {}
    told = _Dynset.encode(set=f"affinity{family}", op=operation, key=8, data=home + 1, **timeout)
    return [*load, _expression("dynset", told)]


class MadeRule(NamedTuple):
    """A rule in nft's language and as the kernel's expressions."""

    text: str
    expressions: list[bytes]


class MadeChain(NamedTuple):
    """A chain with its rules."""

    name: str
    rules: tuple[MadeRule, ...]

    def comments(self) -> list[str]:
        """What the kernel shows of it; as with the table's own rules, comparing comments compares everything."""
        mark = hashlib.sha256("\n".join(rule.text for rule in self.rules).encode()).hexdigest()[:8]
        return [f"{_MARK} {number}/{len(self.rules)} [{mark}]" for number in range(1, len(self.rules) + 1)]

    def script(self) -> list[str]:
        """The lines that make it."""
        lines = [f"add chain inet {TABLE} {self.name}"]
        for rule, comment in zip(self.rules, self.comments(), strict=True):
            lines.append(f'add rule inet {TABLE} {self.name} {rule.text} comment "{comment}"')
        return lines

    def messages(self, there: bool = False) -> list[bytes]:
        """The messages that make it; `there`: it is there, with rules that are not as they should be."""
        if there:
            told = nft.RuleAttrs.encode(table=TABLE, chain=self.name)
            made = [nft.request(nft.Message.DELRULE, nft.INET, told)]
        else:
            told = nft.ChainAttrs.encode(table=TABLE, name=self.name)
            made = [nft.request(nft.Message.NEWCHAIN, nft.INET, told, NLM_F_CREATE | NLM_F_EXCL)]
        where = nft.RuleAttrs.encode(table=TABLE, chain=self.name)
        for rule, comment in zip(self.rules, self.comments(), strict=True):
            note = bytes((0, len(comment) + 1)) + comment.encode() + b"\0"
            told = where + _nested(4, b"".join(rule.expressions)) + nft.RuleAttrs.encode(userdata=note)
            made.append(nft.request(nft.Message.NEWRULE, nft.INET, told, NLM_F_CREATE | _APPEND))
        return made


def chain_of(name: str) -> MadeChain | None:
    """The chain of a name; None for what is not made on demand."""
    head, *numbers = name.split("_")
    family = int(head[-1]) if head[-1:] in ("4", "6") else 0
    if head[:-1] in ("keep", "renew") and family and len(numbers) == 1 and numbers[0].isdecimal():
        return MadeChain(name, _affinity_rules(family, head.startswith("renew"), int(numbers[0])))
    parts = chain_parts(name)
    if not parts.kind:
        return None
    family = int(name.split("_")[1 if parts.place else 0][-1])
    if parts.place == "local":
        rest = name.removeprefix("local_")
        rules = [MadeRule(f"jump insiders{family}", [_verdict(_JUMP, f"insiders{family}")])]
        rules += [MadeRule(f"goto {rest}", [_verdict(_GOTO, rest)])] if parts.slots else []
        return MadeChain(name, tuple(rules))
    return MadeChain(name, _picking(family, parts))


def _picking(family: int, parts: Parts) -> tuple[MadeRule, ...]:
    """Take one of so many slots, or whom the client had."""
    place, kind, seconds, count = parts
    inside = place == "inside"
    first = INSIDE if inside else 0
    pick = f"meta priority set numgen random mod {count}{f' offset {first}' if first else ''}"
    number = MadeRule(f"{pick} jump number{family}", [*_random(count, first), _verdict(_JUMP, f"number{family}")])
    if kind == "draw":
        return (number, MadeRule(f"goto numbered{family}", [_verdict(_GOTO, f"numbered{family}")]))
    if kind == "pick":
        text = f"{pick} goto dnat{family}"
        return (MadeRule(text, [*_random(count, first), _verdict(_GOTO, f"dnat{family}")]),)
    had = [_expression("meta", _Meta.encode(dreg=8, key=_PRIORITY)), _compare(8, _NOT_EQUAL, u32_bytes(0))]
    recall = f"recall_inside{family}" if inside else f"recall{family}"
    keep, renew = f"keep{family}_{seconds}", f"renew{family}_{seconds}"
    return (
        MadeRule(f"jump {recall}", [_verdict(_JUMP, recall)]),
        MadeRule(f"meta priority != 0 goto {keep}", [*had, _verdict(_GOTO, keep)]),
        number,
        MadeRule(f"goto {renew}", [_verdict(_GOTO, renew)]),
    )


def _affinity_rules(family: int, renew: bool, seconds: int) -> tuple[MadeRule, ...]:
    word = "ip" if family == 4 else "ip6"
    key = f"{word} saddr . meta priority & {HOME_BITS >> 16:x}:0"
    number = "meta priority & 7fff:ffff"
    dead = MadeRule(f"delete @affinity{family} {{ {key} : {number} }}", _affinity(family, _DYNSET_DELETE, 0))
    text = f"update @affinity{family} {{ {key} timeout {seconds}s : {number} }}"
    update = MadeRule(text, _affinity(family, _DYNSET_UPDATE, seconds))
    to_endpoint = MadeRule(f"goto numbered{family}", [_verdict(_GOTO, f"numbered{family}")])
    return (dead, update, to_endpoint) if renew else (update, to_endpoint)


def needed(chain: str) -> list[str]:
    """The chain and those it leads to that are made on demand as well, the last one first."""
    place, kind, seconds, slots = chain_parts(chain)
    if place == "local":
        return [*(needed(chain.removeprefix("local_")) if slots else ()), chain]
    family = chain.removeprefix("inside_").split("_")[0][-1:]
    return [f"keep{family}_{seconds}", f"renew{family}_{seconds}", chain] if kind == "sticky" else [chain]
