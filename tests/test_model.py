"""model.py: addresses and ranges as people write them, and how things print."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.model import (
    Problem,
    ServicePortName,
    format_address,
    format_endpoint,
    parse_address,
    parse_network,
)

from .words import at


@given(st.ip_addresses())
def test_addresses_are_read_and_printed_as_ipaddress_does(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    packed = parse_address(str(address))
    assert packed == address.packed
    assert parse_address(format_address(packed)) == packed


@pytest.mark.parametrize(("text", "expected"), [("172.030.000.041", "172.30.0.41"), ("010.0.0.1", "10.0.0.1")])
def test_leading_zeros_are_decimal_as_the_api_server_reads_them(text: str, expected: str) -> None:
    assert format_address(parse_address(text)) == expected


@pytest.mark.parametrize(
    "text", ["", "10.0.0", "10.0.0.256", "1.2.3.4.5", "::g", "a.b.c.d", "10.0.0.1/32", "10.0.0.-1", "1٣.0.0.1"]
)
def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not an IP address"):
        parse_address(text)


@given(st.ip_addresses(v=4), st.integers(0, 32), st.ip_addresses(v=4))
def test_ranges_hold_what_ipaddress_says(
    base: ipaddress.IPv4Address, prefix: int, other: ipaddress.IPv4Address
) -> None:
    network = parse_network(f"{base}/{prefix}")
    oracle = ipaddress.ip_network(f"{base}/{prefix}", strict=False)
    assert str(network) == str(oracle)
    assert (other.packed in network) == (other in oracle)
    assert bytes(16) not in network


@pytest.mark.parametrize("text", ["10.0.0.0/33", "fd00::/129", "10.0.0.0/", "10.0.0.0/-1", "10.0.0.0/8/8", "/8"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an"):
        parse_network(text)


def test_how_things_print() -> None:
    assert format_endpoint(parse_address("fd00::1"), 80) == "[fd00::1]:80"
    assert str(at("SCTP 10.0.0.1:1")) == "SCTP 10.0.0.1:1"
    assert str(ServicePortName("default", "hostnames")) == "default/hostnames"
    assert str(ServicePortName("default", "web", "http")) == "default/web:http"
    assert str(Problem("a.yaml", 7, "Service default/web", "spec.clusterIP", "no address")) == (
        "a.yaml:7: Service default/web: spec.clusterIP: no address"
    )
    assert str(Problem("a.yaml", 0, "", "", "not readable")) == "a.yaml: not readable"
