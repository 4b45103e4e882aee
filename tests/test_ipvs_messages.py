"""ipvs_messages.py: golden messages by linux/ip_vs.h, and that templates and the plain codec agree."""

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.ipvs_messages import (
    DATA,
    DEL_DEST,
    DEL_SERVICE,
    NEW_DEST,
    NEW_SERVICE,
    SET_DEST,
    SET_SERVICE,
    CommandAttrs,
    Encoder,
    Traffic,
    decode_real,
    decode_server,
    name_message,
)
from dataplane.model import VirtualServer
from dataplane.netlink_socket import GENL_HEADER, HEADER, NLM_F_ACK, NLM_F_REQUEST, genl_message
from dataplane.plan import Change, Reals

from .words import server, split

ENCODER = Encoder(family_id=0x1E)
TUTORIAL = server("TCP 10.0.1.175:80 rr -> 10.244.3.6:9376")

SERVICE_KEY = (
    "0600 0100 0200 0000"  # IPVS_SVC_ATTR_AF = AF_INET
    "0600 0200 0600 0000"  # IPVS_SVC_ATTR_PROTOCOL = TCP
    "1400 0300 0a0001af 00000000 00000000 00000000"  # IPVS_SVC_ATTR_ADDR
    "0600 0400 0050 0000"  # IPVS_SVC_ATTR_PORT, network order
)
NEW_SERVICE_GOLDEN = (
    "68000000 1e00 0100 00000000 00000000"  # nlmsghdr: 104 bytes, family, NLM_F_REQUEST
    "01 01 0000"  # genlmsghdr: IPVS_CMD_NEW_SERVICE, version 1
    "5400 0180"  # IPVS_CMD_ATTR_SERVICE, nested
    + SERVICE_KEY
    + "0700 0600 727200 00"  # IPVS_SVC_ATTR_SCHED_NAME = "rr"
    "0c00 0700 00000000 ffffffff"  # IPVS_SVC_ATTR_FLAGS = flags, mask
    "0800 0800 00000000"  # IPVS_SVC_ATTR_TIMEOUT
    "0800 0900 ffffffff"  # IPVS_SVC_ATTR_NETMASK
)
NEW_DEST_GOLDEN = (
    "8c000000 1e00 0100 00000000 00000000"
    "05 01 0000"  # IPVS_CMD_NEW_DEST
    "3000 0180" + SERVICE_KEY + "4800 0280"  # IPVS_CMD_ATTR_DEST, nested
    "1400 0100 0af40306 00000000 00000000 00000000"  # IPVS_DEST_ATTR_ADDR
    "0600 0200 24a0 0000"  # IPVS_DEST_ATTR_PORT = 9376
    "0800 0300 00000000"  # IPVS_DEST_ATTR_FWD_METHOD = masquerading
    "0800 0400 01000000"  # IPVS_DEST_ATTR_WEIGHT
    "0800 0500 00000000"  # IPVS_DEST_ATTR_U_THRESH
    "0800 0600 00000000"  # IPVS_DEST_ATTR_L_THRESH
    "0600 0b00 0200 0000"  # IPVS_DEST_ATTR_ADDR_FAMILY
)


def test_the_tutorials_service_byte_by_byte() -> None:
    assert ENCODER.new_server(TUTORIAL).hex(" ") == bytes.fromhex(NEW_SERVICE_GOLDEN + NEW_DEST_GOLDEN).hex(" ")


def test_each_command_alone() -> None:
    real = TUTORIAL.real_servers[0]
    assert ENCODER.server(NEW_SERVICE, TUTORIAL) == bytes.fromhex(NEW_SERVICE_GOLDEN)
    assert ENCODER.real(NEW_DEST, TUTORIAL, real) == bytes.fromhex(NEW_DEST_GOLDEN)
    for command in (SET_SERVICE, DEL_SERVICE):
        assert name_message(ENCODER.server(command, TUTORIAL))[:2] == (command, TUTORIAL.at)
    for command in (SET_DEST, DEL_DEST):
        assert name_message(ENCODER.real(command, TUTORIAL, real))[:3] == (command, TUTORIAL.at, (real.address, 9376))


def test_several_real_servers_in_one_piece_of_which_the_last_asks_for_an_ack() -> None:
    one, two, odd = (
        server(f"TCP 10.0.1.175:80 rr -> 10.244.3.{each}").real_servers[0] for each in ("6:1", "7:2 w0", "8:3")
    )
    odd = msgspec.structs.replace(odd, upper_threshold=9)
    commands = [(NEW_DEST, one), (SET_DEST, two), (SET_DEST, odd), (DEL_DEST, one)]
    for count in (1, 2, 3, 4):
        plain = [ENCODER.real(command, TUTORIAL, real) for command, real in commands[:count]]
        last = bytearray(plain[-1])
        last[6:12] = struct.pack("=H", NLM_F_REQUEST | NLM_F_ACK) + struct.pack(">I", 77)
        add, edit, remove = (
            [real for command, real in commands[:count] if command == each] for each in (NEW_DEST, SET_DEST, DEL_DEST)
        )
        change = Change(TUTORIAL, TUTORIAL, False, Reals(add, edit, remove))
        assert ENCODER.reals([change], 77) == b"".join(plain[:-1]) + last
        assert ENCODER.reals([change, change], 77) == b"".join([*plain, *plain[:-1]]) + last


lines = st.builds(
    "{} {} {}{} -> {}".format,
    st.sampled_from(["TCP", "UDP", "SCTP"]),
    st.sampled_from(["10.0.0.1:80", "255.1.2.3:65535", "[fd00::1]:1", "[2001:db8::ffff]:443"]),
    st.sampled_from(["rr", "wlc", "mh flags=18", "sh flags=8"]),
    st.sampled_from(["", " sticky=300"]),
    st.lists(
        st.builds("10.1.0.{}:{}{}".format, st.integers(1, 9), st.integers(1, 9), st.sampled_from(["", " w0", " w3"])),
        max_size=14,
        unique_by=lambda text: text.split()[0],
    ).map(", ".join),
)


@given(lines)
def test_bulk_and_single_messages_are_the_same_bytes(line: str) -> None:
    one = server(line)
    alone = [ENCODER.server(NEW_SERVICE, one), *(ENCODER.real(NEW_DEST, one, real) for real in one.real_servers)]
    assert ENCODER.new_server(one) == b"".join(alone)


@given(lines)
def test_what_is_sent_decodes_to_what_was_meant(line: str) -> None:
    one = server(line)
    message = ENCODER.server(NEW_SERVICE, one)
    entry = decode_server(message)
    assert (entry.server, entry.fwmark, entry.traffic) == (
        VirtualServer(one.at, (), one.scheduler, one.flags, one.persistence, one.persistence_prefix),
        0,
        Traffic(),
    )
    for real in one.real_servers:
        answer = ENCODER.real(NEW_DEST, one, real)
        dest = CommandAttrs.decode(answer, DATA)["dest"] | {"active_conns": 5, "inact_conns": 6, "persist_conns": 7}
        told = genl_message(0x1E, NEW_DEST, 0, CommandAttrs.encode(dest=dest))
        seen = decode_real(told)
        assert (seen.real, seen.active, seen.inactive, seen.persistent) == (real, 5, 6, 7)


def test_statistics_are_64_bit() -> None:
    stats = {"connections": 2**40, "bytes_in": 2**50}
    service = {"af": 2, "protocol": 6, "addr": split("1.2.3.4:1")[0], "port": 1, "sched_name": "rr"}
    service |= {"flags": bytes(8), "timeout": 0, "netmask": 0xFFFFFFFF, "stats64": stats}
    entry = decode_server(genl_message(0x1E, 4, 0, CommandAttrs.encode(service=service)))
    assert (entry.traffic.connections, entry.traffic.bytes_in) == (2**40, 2**50)


@pytest.mark.parametrize("line", ["TCP 10.0.0.1:80 rr", "UDP [fd00::1]:53 rr"])
def test_dump_requests_name_their_server(line: str) -> None:
    one = server(line)
    request = ENCODER.get_reals(one.at)
    assert HEADER.unpack_from(request)[0] == len(request)
    assert GENL_HEADER.unpack_from(request, HEADER.size)[0] == 8
    assert name_message(request).at == one.at
    assert name_message(ENCODER.get_server(one.at)).at == one.at
