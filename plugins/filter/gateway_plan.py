# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""What the gateway's configuration is made of, from the variables of the role gateway."""

from __future__ import annotations

DOCUMENTATION = r"""
name: gateway_plan
short_description: Group the engines by model, or return everything that is wrong with the variables
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Returns what the template of C(haproxy.cfg) needs. Fails with all faults in one message, each with its variable and
    the way out. No key is in a message.
options:
  _input:
    description: The variables of the role gateway, without C(gateway_) before their names.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show which models there are
  ansible.builtin.debug:
    msg: "{{ (variables | selfhost.lmdeploy.gateway_plan).models | map(attribute='name') }}"
"""

RETURN = r"""
_value:
  description: C(models), each with C(name), C(backend) and C(engines), and C(models_json), the answer to C(/v1/models).
  type: dict
"""

from typing import TYPE_CHECKING, Any

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import gateway

if TYPE_CHECKING:
    from collections.abc import Callable


def gateway_plan(variables: dict[str, Any]) -> dict[str, Any]:
    """Return what the template needs (see DOCUMENTATION)."""
    try:
        return gateway.plan(variables)
    except gateway.GatewayFault as fault:
        raise AnsibleFilterError(str(fault)) from fault


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., dict[str, Any]]]:
        """Return the filter by its name."""
        return {"gateway_plan": gateway_plan}
