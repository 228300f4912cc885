# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""The hosts of some groups that a play has something to do on."""

from __future__ import annotations

DOCUMENTATION = r"""
name: hosts_to_do
short_description: Return the hosts of some groups, without those that are as wanted
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - For C(hosts) of a play. Groups that the inventory lacks are passed over; without any host, the pattern that matches
    none is returned.
  - Who is as wanted was found by M(selfhost.lmdeploy.settled_hosts); where that did not run, all hosts are returned.
positional: groups, hostvars
options:
  _input:
    description: Names of groups.
    type: list
    elements: str
    required: true
  groups:
    description: All groups with their hosts.
    type: dict
    required: true
  hostvars:
    description: All hosts with their variables; empty where no play has run yet.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Serve the models
  hosts: "{{ ['model_servers'] | selfhost.lmdeploy.hosts_to_do(groups, hostvars | default({})) }}"
"""

RETURN = r"""
_value:
  description: Names of hosts.
  type: list
  elements: str
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

NOBODY = "all:!all"


def settled_hosts(hosts: list[str], hostvars: Mapping[str, Any]) -> set[str]:
    """Return who is as wanted. Each host of the run knows that of all, one that is left out by a limit nothing."""
    for host in hosts if hostvars else []:
        found = (hostvars[host].get("ansible_facts") or {}).get("site_settled")
        if found:
            return set(found["hosts"])
    return set()


def hosts_to_do(names: list[str], groups: Mapping[str, list[str]], hostvars: Mapping[str, Any]) -> list[str]:
    """Return the hosts (see DOCUMENTATION)."""
    hosts = list(dict.fromkeys(host for name in names for host in groups.get(name, [])))
    settled = settled_hosts(hosts, hostvars)
    return [host for host in hosts if host not in settled] or [NOBODY]


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., list[str]]]:
        """Return the filter by its name."""
        return {"hosts_to_do": hosts_to_do}
