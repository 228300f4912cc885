# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Where the address that gateways share stands on one of them. Pure, no Ansible."""

from __future__ import annotations

import ipaddress
from typing import Any

# VRRP's own default is 100, and 255 is for who owns an address for good.
HIGHEST_PRIORITY = 200
ROUTERS = range(1, 256)
LEAST_GATEWAYS = 2


class AddressFault(Exception):
    """Why a host can't share the address, one sentence that begins with the variable."""


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def _network(entry: dict[str, Any]) -> ipaddress.IPv4Network:
    return ipaddress.IPv4Network(f"{entry['local']}/{entry['prefixlen']}", strict=False)


def faults(address: str, gateways: list[str], router: int, host: str) -> list[str]:
    """Return what is wrong with the role's variables, seen without the host; nothing where no address is shared."""
    if not address:
        return []
    found = []
    if not _is_ipv4(address):
        found.append(f"gateway_virtual_address is '{address}': take a free IPv4 address of the gateways' network")
    if host != "0.0.0.0":  # noqa: S104  # compared, not listened on
        found.append(
            f"gateway_host is {host}, where gateway_virtual_address {address} is not answered: "
            "leave gateway_host at 0.0.0.0"
        )
    if router not in ROUTERS:
        found.append(f"gateway_virtual_router is {router}: take a number from 1 to 255 that no other VRRP here has")
    odd = [gateway for gateway in gateways if not _is_ipv4(gateway)]
    if odd:
        found.append(
            f"gateway_virtual_gateways has {', '.join(odd)}: VRRP goes between IPv4 addresses, "
            "so give one for each gateway"
        )
    if address in gateways:
        found.append(
            f"gateway_virtual_address is {address}, the address of one gateway alone: "
            "take a free address of their network"
        )
    if len(set(gateways)) < len(gateways):
        found.append("gateway_virtual_gateways has one address twice: give one for each gateway")
    if gateways and len(gateways) < LEAST_GATEWAYS:
        found.append(
            f"gateway_virtual_gateways has {gateways[0]} alone: an address is shared by two gateways or more, "
            "so add one, or leave gateway_virtual_address empty"
        )
    return found


def place(address: str, gateways: list[str], interfaces: list[dict[str, Any]]) -> dict[str, Any]:
    """Return interface, own address, other gateways and priority of one host; raises AddressFault.

    ``interfaces`` is what ``ip -json address`` prints.
    """
    if not gateways:
        message = "gateway_virtual_gateways is empty: give the IPv4 address of each gateway, in the same order on all"
        raise AddressFault(message)
    here = {
        entry["local"]: (
            interface["ifname"],
            _network(entry),
        )
        for interface in interfaces
        for entry in interface.get("addr_info", [])
        if entry.get("family") == "inet"
    }
    own = [gateway for gateway in gateways if gateway in here]
    if len(own) != 1:
        has = ", ".join(sorted(name for name in here if name != address)) or "none"
        which = "none of them is" if not own else f"{' and '.join(own)} are"
        message = (
            f"gateway_virtual_gateways is {', '.join(gateways)}, and {which} an address of this host, which has {has}: "
            "give exactly one address of each gateway"
        )
        raise AddressFault(message)
    interface, network = here[own[0]]
    outside = [other for other in (address, *gateways) if ipaddress.IPv4Address(other) not in network]
    if outside:
        message = (
            f"gateway_virtual_address is {address}, and {', '.join(outside)} is not in {network}, the network of "
            f"{own[0]} on {interface}: both stand in one network, else it can't go from one to the other"
        )
        raise AddressFault(message)
    return {
        "interface": interface,
        "own": own[0],
        "peers": [gateway for gateway in gateways if gateway != own[0]],
        "priority": HIGHEST_PRIORITY - gateways.index(own[0]),
    }
