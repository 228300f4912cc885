"""Where an address that gateways share stands, and what is wrong with it."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import virtual_address as shared

GATEWAYS = ["192.0.2.10", "192.0.2.11", "192.0.2.12"]


def interfaces(*addresses: tuple[str, str, int]) -> list[dict[str, Any]]:
    """Return what `ip -json address` tells of a host."""
    six = {"family": "inet6", "local": "fe80::1", "prefixlen": 64}
    lo = {"ifname": "lo", "addr_info": [{"family": "inet", "local": "127.0.0.1", "prefixlen": 8}]}
    others = [
        {"ifname": name, "addr_info": [six, {"family": "inet", "local": local, "prefixlen": prefix}]}
        for name, local, prefix in addresses
    ]
    return [lo, *others]


def test_each_gateway_finds_itself_and_the_others() -> None:
    # The shared address stands on the one that has it, beside its own.
    here = interfaces(("eth1", "10.0.0.1", 24), ("eth0", "192.0.2.11", 24), ("eth0", "192.0.2.20", 32))
    assert shared.place("192.0.2.20", GATEWAYS, here) == {
        "interface": "eth0",
        "own": "192.0.2.11",
        "peers": ["192.0.2.10", "192.0.2.12"],
        "priority": 199,
    }


@pytest.mark.parametrize(
    ("address", "gateways", "words"),
    [
        ("192.0.2.20", [], "gateway_virtual_gateways is empty"),
        (
            "192.0.2.20",
            GATEWAYS[1:],
            "none of them is an address of this host, which has 10.0.0.1, 127.0.0.1",
        ),
        ("192.0.2.20", ["192.0.2.10", "10.0.0.1"], "192.0.2.10 and 10.0.0.1 are an address of this host"),
        ("10.0.0.20", GATEWAYS, "10.0.0.20 is not in 192.0.2.0/24, the network of 192.0.2.10 on eth0"),
        ("192.0.2.20", ["192.0.2.10", "198.51.100.1"], "198.51.100.1 is not in 192.0.2.0/24"),
    ],
)
def test_a_host_that_can_not_share_it_says_why(address: str, gateways: list[str], words: str) -> None:
    here = interfaces(("eth1", "10.0.0.1", 24), ("eth0", "192.0.2.10", 24))
    with pytest.raises(shared.AddressFault, match="gateway_virtual_") as raised:
        shared.place(address, gateways, here)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"address": "chat.example.org"}, "gateway_virtual_address is 'chat.example.org'"),
        ({"address": "2001:db8::1"}, "take a free IPv4 address"),
        ({"host": "192.0.2.10"}, "gateway_host is 192.0.2.10"),
        ({"router": 256}, "gateway_virtual_router is 256"),
        ({"gateways": ["gw-1", "192.0.2.11"]}, "gateway_virtual_gateways has gw-1"),
        ({"address": "192.0.2.11"}, "the address of one gateway alone"),
        ({"gateways": ["192.0.2.10", "192.0.2.10"]}, "one address twice"),
        ({"gateways": ["192.0.2.10"]}, "has 192.0.2.10 alone"),
    ],
)
def test_a_fault_names_its_variable(changes: dict[str, Any], words: str) -> None:
    given = {"address": "192.0.2.20", "gateways": GATEWAYS, "router": 51, "host": "0.0.0.0", **changes}
    found = shared.faults(**given)
    assert len(found) == 1, found
    assert words in found[0]
    assert shared.faults(**{**given, "address": ""}) == []


def test_what_is_right_has_no_fault() -> None:
    assert shared.faults("192.0.2.20", GATEWAYS, 51, "0.0.0.0") == []
    # site.yml computes the gateways after preflight.
    assert shared.faults("192.0.2.20", [], 51, "0.0.0.0") == []
