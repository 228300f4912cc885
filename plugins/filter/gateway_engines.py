# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""The engines of all model servers, as the role gateway takes them."""

from __future__ import annotations

DOCUMENTATION = r"""
name: gateway_engines
short_description: Return the engines of all model servers, as the role gateway takes them
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Takes what M(selfhost.lmdeploy.engine_connections) returned for each host. An engine is called C(HOST-PORT).
  - The result holds the engines' keys, so the task that uses it wants C(no_log).
positional: hosts, twin_port_offsets
options:
  _input:
    description: Results of the module, one for each host.
    type: list
    elements: dict
    required: true
  hosts:
    description: Names of the hosts, in the same order.
    type: list
    elements: str
    required: true
  twin_port_offsets:
    description: The hosts' C(api_server_twin_port_offset), in the same order. Where it is above 0 each engine has a
      second entry, C(HOST-twin-PORT), that is asked only when nobody else with the model can be.
    type: list
    elements: int
    default: []
"""

EXAMPLES = r"""
- name: Know the engines
  ansible.builtin.set_fact:
    gateway_engines: "{{ found.results | selfhost.lmdeploy.gateway_engines(groups['model_servers']) }}"
  no_log: true
"""

RETURN = r"""
_value:
  description: One entry for each engine, with C(name), C(address), C(port), C(model), C(api_key), and C(reserve) for
    a twin.
  type: list
  elements: dict
"""

from typing import TYPE_CHECKING, Any

from ansible_collections.selfhost.lmdeploy.plugins.module_utils import gateway

if TYPE_CHECKING:
    from collections.abc import Callable


def gateway_engines(
    results: list[dict[str, Any]], hosts: list[str], twin_port_offsets: list[int] | None = None
) -> list[dict[str, Any]]:
    """Return the engines (see DOCUMENTATION)."""
    found = []
    for host, result, offset in zip(hosts, results, twin_port_offsets or [0] * len(hosts), strict=True):
        engines, connections = result.get("engines") or [], result.get("connections") or []
        found += gateway.engine_entries(host, engines, connections, int(offset))
    return found


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., list[dict[str, Any]]]]:
        """Return the filter by its name."""
        return {"gateway_engines": gateway_engines}
