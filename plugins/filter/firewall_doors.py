# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""The doors that the inventory opens on a host."""

from __future__ import annotations

DOCUMENTATION = r"""
name: firewall_doors
short_description: Return the ports that the inventory has a host answer others on
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - A gateway answers on its TLS port. An engine or a web interface answers others only where its address says so; what
    listens on loopback needs no door.
positional: groups
options:
  _input:
    description: Variables of the host.
    type: dict
    required: true
  groups:
    description: Groups of the host.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Show the open doors
  ansible.builtin.debug:
    msg: "{{ hostvars[inventory_hostname] | selfhost.lmdeploy.firewall_doors(group_names) }}"
"""

RETURN = r"""
_value:
  description: C(port) and C(networks) of each door; no networks means all.
  type: list
  elements: dict
"""

from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def answers_others(host: str) -> bool:
    """Tell whether who listens on an address can be reached from another host."""
    try:
        return not ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host != "localhost"


def firewall_doors(variables: Mapping[str, Any], groups: list[str]) -> list[dict[str, Any]]:
    """Return the doors of a host (see DOCUMENTATION)."""
    found: list[dict[str, Any]] = []

    def door(host: object, port: object, networks: list[str] | None = None) -> None:
        entry = {"port": int(str(port)), "networks": list(networks or [])}
        if answers_others(str(host)) and entry not in found:
            found.append(entry)

    if "gateways" in groups:
        door(variables.get("gateway_host", "0.0.0.0"), variables.get("gateway_port", 443))  # noqa: S104  # the role's default
    if "model_servers" in groups:
        host, port = variables.get("api_server_host", "127.0.0.1"), variables.get("api_server_port", 23333)
        for instance in variables.get("api_server_instances") or [{}]:
            networks = variables.get("api_server_allowed_networks")
            door(instance.get("host", host), instance.get("port", port), networks)
            if offset := int(variables.get("api_server_twin_port_offset") or 0):
                door(instance.get("host", host), int(instance.get("port", port)) + offset, networks)
    if "web_uis" in groups:
        door(variables.get("open_webui_host", "127.0.0.1"), variables.get("open_webui_port", 8080))
    return found


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., list[dict[str, Any]]]]:
        """Return the filter by its name."""
        return {"firewall_doors": firewall_doors}
