"""Packets with a mark are delivered to this node (rtnetlink: linux/fib_rules.h): how ipvs mode gets what is for
addresses that the node does not have, and for some of their ports only."""

import errno
import struct
from collections.abc import Iterator

from .errors import KernelError
from .model import Family
from .netlink_route import (
    LOOPBACK,
    ROUTE_PROTOCOL,
    RT_SCOPE_HOST,
    RTM_DELROUTE,
    RTM_GETROUTE,
    RTM_NEWROUTE,
    RTMSG,
    RTN_LOCAL,
    RouteAttrs,
)
from .netlink_socket import HEADER, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkSocket, message
from .nlattr import NlAttrs, attr, cstring, u8, u32

RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
_FIBRULE = struct.Struct("=BBBBBBBBI")  # struct fib_rule_hdr: family, lengths, tos, table, 0, 0, action, flags
DELIVERY_TABLE = 8686
DELIVERY_PREFERENCE = 86
_TO_TABLE, _GOTO, _NOP = 1, 2, 3  # FR_ACT_*


class RuleAttrs(NlAttrs):
    """FRA_* (linux/fib_rules.h)."""

    in_interface = attr(3, cstring)
    goto = attr(4, u32)
    preference = attr(6, u32)
    mark = attr(10, u32)
    table = attr(15, u32)
    mask = attr(16, u32)
    protocol = attr(21, u8)


class MarkedDelivery:
    """Packets that come in with a mark are delivered to this node: three routing rules and a route for each family.

    `iif lo` stands for everything that does not come in: packets of this node, and the kernel's check of a packet's
    source, which heeds marks where src_valid_mark is set. These go on as if we were not there.
    """

    def __init__(self, sock: NetlinkSocket, mark: int, mask: int) -> None:
        self._sock = sock
        marked = {"mark": mark, "mask": mask, "protocol": ROUTE_PROTOCOL}
        after = DELIVERY_PREFERENCE + 2
        self._rules: tuple[tuple[int, dict[str, object]], ...] = (
            (_NOP, {"preference": after, **marked}),
            (_TO_TABLE, {"preference": DELIVERY_PREFERENCE + 1, **marked, "table": DELIVERY_TABLE}),
            (_GOTO, {"preference": DELIVERY_PREFERENCE, **marked, "in_interface": "lo", "goto": after}),
        )

    def exists(self) -> bool:
        """Whether all of it is there, in each family that this kernel has."""
        return not any(self._missing())

    def ensure(self) -> bool:
        """Make what is missing; True if something was written."""
        missing = list(self._missing())
        for message_, subject in missing:
            self._sock.request(message_, "add", subject)
        return bool(missing)

    def remove(self) -> None:
        """Take away what is ours."""
        for family in Family:
            for action, attributes in self._found_rules(family) or ():
                self._sock.request(_rule(RTM_DELRULE, 0, family, action, attributes), "delete", "routing rule")
            if self._has_route(family):
                self._sock.request(_delivery_route(RTM_DELROUTE, 0, family), "delete", "local route")

    def commands(self) -> list[tuple[str, str]]:
        """What `ensure` makes, as `ip -batch` text for each family."""
        lines = [f"route add local default dev lo table {DELIVERY_TABLE} protocol {ROUTE_PROTOCOL}"]
        for action, rule in self._rules:
            where = f" iif {rule['in_interface']}" if "in_interface" in rule else ""
            what = {_NOP: "nop", _TO_TABLE: f"table {DELIVERY_TABLE}", _GOTO: f"goto {rule.get('goto')}"}[action]
            mark = f"fwmark {rule['mark']:#x}/{rule['mask']:#x}"
            lines.append(f"rule add priority {rule['preference']}{where} {mark} {what} protocol {ROUTE_PROTOCOL}")
        text = "".join(line + "\n" for line in lines)
        return [("ip -batch -", text), ("ip -6 -batch -", text)]

    def concerns(self, notification: bytes) -> bool:
        """Whether a notification of GROUPS is about one of our rules or routes."""
        kind = HEADER.unpack_from(notification)[1]
        if kind in (RTM_NEWRULE, RTM_DELRULE):
            return _decoded_rule(notification)[1].get("protocol") == ROUTE_PROTOCOL
        if kind not in (RTM_NEWROUTE, RTM_DELROUTE):
            return False
        return RouteAttrs.decode(notification, HEADER.size + RTMSG.size).get("table") == DELIVERY_TABLE

    def _missing(self) -> Iterator[tuple[bytes, str]]:
        """The messages that make what is not there."""
        for family in Family:
            found = self._found_rules(family)
            if found is None:
                if family is Family.IPV4:
                    raise KernelError("read", "routing rules", errno.EOPNOTSUPP, "no CONFIG_IP_MULTIPLE_TABLES")
                continue
            if not self._has_route(family):
                yield _delivery_route(RTM_NEWROUTE, NLM_F_CREATE, family), f"local route of table {DELIVERY_TABLE}"
            for rule in self._rules:
                if rule not in found:
                    text = f"routing rule {rule[1]['preference']}"
                    yield _rule(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, family, *rule), text

    def _found_rules(self, family: Family) -> list[tuple[int, dict[str, object]]] | None:
        """Our rules of a family; None when the kernel does not have the family."""
        asked = message(RTM_GETRULE, NLM_F_REQUEST, _FIBRULE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0))
        try:
            answers = self._sock.dump(asked)
        except KernelError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
                raise
            return None
        found = []
        for action, values in map(_decoded_rule, answers):
            if values.get("protocol") == ROUTE_PROTOCOL:
                if action != _TO_TABLE:
                    values.pop("table", None)
                found.append((action, values))
        return found

    def _has_route(self, family: Family) -> bool:
        body = RTMSG.pack(family, 0, 0, 0, 0, ROUTE_PROTOCOL, 0, 0, 0) + RouteAttrs.encode(table=DELIVERY_TABLE)
        try:
            answers = self._sock.dump(message(RTM_GETROUTE, NLM_F_REQUEST, body))
        except KernelError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT, errno.ENOENT):
                raise
            return False  # there is no such table yet
        for answer in answers:
            head = RTMSG.unpack_from(answer, HEADER.size)
            table = RouteAttrs.decode(answer, HEADER.size + RTMSG.size).get("table", head[4])
            if (table, head[1], head[5], head[7]) == (DELIVERY_TABLE, 0, ROUTE_PROTOCOL, RTN_LOCAL):
                return True
        return False


def _decoded_rule(answer: bytes) -> tuple[int, dict[str, object]]:
    """A routing rule: what it does, and its attributes."""
    action = _FIBRULE.unpack_from(answer, HEADER.size)[7]
    return action, RuleAttrs.decode(answer, HEADER.size + _FIBRULE.size)


def _rule(kind: int, flags: int, family: Family, action: int, attributes: dict[str, object]) -> bytes:
    body = _FIBRULE.pack(family, 0, 0, 0, 0, 0, 0, action, 0) + RuleAttrs.encode(**attributes)
    return message(kind, NLM_F_REQUEST | flags, body)


def _delivery_route(kind: int, flags: int, family: Family) -> bytes:
    """`local default dev lo table 8686 proto 86`."""
    scope = RT_SCOPE_HOST if family is Family.IPV4 else 0
    body = RTMSG.pack(family, 0, 0, 0, 0, ROUTE_PROTOCOL, scope, RTN_LOCAL, 0)
    body += RouteAttrs.encode(out_interface=LOOPBACK, table=DELIVERY_TABLE)
    return message(kind, NLM_F_REQUEST | flags, body)
