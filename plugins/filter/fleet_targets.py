# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""The targets of a fleet as one monitor sees them."""

from __future__ import annotations

DOCUMENTATION = r"""
name: fleet_targets
short_description: Return the targets of a fleet as one monitor sees them
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - What listens on another host's loopback address is left out, since it can't be reached.
positional: monitor
options:
  _input:
    description: Hosts with name, address, and where their exporter, engines, gateway and web interface listen.
    type: list
    required: true
    elements: dict
  monitor:
    description: Name of the host that Prometheus runs on.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Show what is watched
  ansible.builtin.debug:
    msg: "{{ hosts | selfhost.lmdeploy.fleet_targets(inventory_hostname) }}"
"""

RETURN = r"""
_value:
  description: Targets, as the variable C(monitoring_targets) of the role monitoring takes them.
  type: list
"""

from typing import TYPE_CHECKING, Any

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import prometheus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def fleet_targets(hosts: Sequence[Mapping[str, Any]], monitor: str) -> list[dict[str, Any]]:
    """Return the targets (see DOCUMENTATION)."""
    try:
        return prometheus.fleet_targets(hosts, monitor)
    except (prometheus.MonitoringFault, KeyError, ValueError) as fault:
        raise AnsibleFilterError(f"the hosts are not as fleet_targets takes them: {fault!r}") from fault


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filter by its name."""
        return {"fleet_targets": fleet_targets}
