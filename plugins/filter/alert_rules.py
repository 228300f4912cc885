# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Alert rules with what an inventory changes in them."""

from __future__ import annotations

DOCUMENTATION = r"""
name: alert_rules
short_description: Return alert rules with what an inventory changes
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Fields of an alert are replaced by name, and an alert is left out with C(enabled) false. An unknown name is refused.
positional: changes
options:
  _input:
    description: Content of a rule file.
    type: dict
    required: true
  changes:
    description: Alert name to the fields that replace the file's; C(expr), C(for), C(labels), C(annotations), or
      C(enabled).
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show rules that fire sooner
  ansible.builtin.debug:
    msg: "{{ rules | selfhost.lmdeploy.alert_rules({'EngineDown': {'for': '30s'}}) }}"
  vars:
    rules: "{{ lookup('ansible.builtin.file', 'rules.yml') | from_yaml }}"
"""

RETURN = r"""
_value:
  description: Content of the changed rule file.
  type: dict
"""

from typing import TYPE_CHECKING, Any

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import prometheus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def alert_rules(content: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the rules (see DOCUMENTATION)."""
    try:
        return prometheus.rules(content, changes)
    except prometheus.MonitoringFault as fault:
        raise AnsibleFilterError(str(fault)) from fault


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filter by its name."""
        return {"alert_rules": alert_rules}
