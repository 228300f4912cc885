# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""What Prometheus is given for a list of targets."""

from __future__ import annotations

DOCUMENTATION = r"""
name: monitoring_plan
short_description: Return what Prometheus is given for a list of targets
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Makes the configuration, the files of keys that it names, and the networks that its unit must reach.
positional: settings
options:
  _input:
    description: Targets, as the variable C(monitoring_targets) of the role monitoring has them.
    type: list
    required: true
    elements: dict
  settings:
    description: Interval, rule files, alertmanagers, folder of keys, addresses and networks; see the role's vars.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show the configuration
  ansible.builtin.debug:
    msg: "{{ (monitoring_targets | selfhost.lmdeploy.monitoring_plan(__monitoring_settings)).configuration }}"
"""

RETURN = r"""
_value:
  description: C(configuration) of Prometheus, C(key_files) as config_files takes them, and C(networks),
    empty where a target has a
    name and no address.
  type: dict
"""

from typing import TYPE_CHECKING, Any

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import prometheus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def monitoring_plan(targets: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan (see DOCUMENTATION)."""
    try:
        return {
            "configuration": prometheus.configuration(targets, settings),
            "key_files": prometheus.key_entries(targets, settings),
            "networks": prometheus.networks(targets, settings["allowed_networks"], settings["alertmanagers"]),
        }
    except prometheus.MonitoringFault as fault:
        raise AnsibleFilterError(str(fault)) from fault


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filter by its name."""
        return {"monitoring_plan": monitoring_plan}
