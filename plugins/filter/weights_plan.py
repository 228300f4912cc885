# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Which host fetches which model from the hub, and which take it from other hosts."""

from __future__ import annotations

DOCUMENTATION = r"""
name: weights_plan
short_description: Say which host fetches which model from the hub, and which take it from other hosts
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Takes what M(selfhost.lmdeploy.model_snapshot) returned on each host with C(manifests).
  - A model that some host has is taken from there. What none has is fetched by one host.
positional: hosts, registers, port
options:
  _input:
    description: The variables of all hosts (C(hostvars)).
    type: dict
    required: true
  hosts:
    description: Names of the hosts that share their models.
    type: list
    elements: str
    required: true
  registers:
    description: Names of the registered results, the newest last. A host without them is left out.
    type: list
    elements: str
    required: true
  port:
    description: Port on which each host gives.
    type: int
    required: true
"""

EXAMPLES = r"""
- name: Share out the work
  ansible.builtin.set_fact:
    plan: "{{ hostvars | selfhost.lmdeploy.weights_plan(ansible_play_hosts, ['seen', 'fetched'], 8377) }}"
"""

RETURN = r"""
_value:
  description: >-
    C(fetch), the models that a host gets from the hub, by host; C(take), the manifests of models that a host takes from
    others, by host; C(share), the hosts that give; C(peers), the same with C(name), C(address) and C(port);
    C(addresses), the address of each host.
  type: dict
"""

from typing import TYPE_CHECKING, Any

from ansible_collections.selfhost.lmdeploy.plugins.module_utils.model_peers import share_out

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def weights_plan(hostvars: Mapping[str, Any], hosts: list[str], registers: list[str], port: int) -> dict[str, Any]:
    """Return the plan (see DOCUMENTATION)."""
    known: dict[str, list[dict[str, Any]]] = {}
    for name in hosts:
        variables = hostvars[name]
        results = [variables[register] for register in registers if register in variables]
        known[name] = [result for result in results if result.get("models")]
    addresses = {name: results[0].get("address", "") for name, results in known.items() if results}
    plan = share_out({name: results for name, results in known.items() if results})
    peers = [{"name": name, "address": addresses[name], "port": int(port)} for name in plan["share"]]
    return {**plan, "peers": peers, "addresses": addresses}


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., dict[str, Any]]]:
        """Return the filter by its name."""
        return {"weights_plan": weights_plan}
