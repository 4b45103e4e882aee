"""Fixtures of all tests; tests/guest.py decides on which kernel they run."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.netns import NetNs, Topology

settings.register_profile("dataplane", deadline=None)  # how fast a busy machine is proves nothing
settings.load_profile("dataplane")

pytest_plugins = ["tests.guest"]


@pytest.fixture
def netns() -> Iterator[NetNs]:
    """A fresh network namespace, loopback up; the test itself stays outside of it."""
    with NetNs.create() as namespace:
        yield namespace


@pytest.fixture
def topology() -> Iterator[Topology]:
    """A node, three pods with IPv4 and IPv6 addresses, and a client."""
    with Topology.build() as built:
        yield built
