#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Find where an address that gateways share stands on this host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: virtual_address
short_description: Find where an address that gateways share stands on this host
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Tells which interface carries the address, which of the gateways this host is, and the others. Changes nothing.
  - Fails when the host is none of the gateways, or when address and gateways are not in one network.
options:
  address:
    description: The IPv4 address that the gateways share.
    type: str
    required: true
  gateways:
    description: IPv4 address of each gateway, in the same order on all; the first is preferred.
    type: list
    elements: str
    required: true
attributes:
  check_mode:
    description: Only looks.
    support: full
  diff_mode:
    description: Only looks.
    support: none
"""

EXAMPLES = r"""
- name: Find this host among the gateways
  selfhost.lmdeploy.virtual_address:
    address: 192.0.2.20
    gateways: [192.0.2.10, 192.0.2.11]
"""

RETURN = r"""
interface:
  description: Interface that carries the address.
  returned: success
  type: str
  sample: eth0
own:
  description: Address of this gateway.
  returned: success
  type: str
  sample: 192.0.2.10
peers:
  description: Addresses of the others.
  returned: success
  type: list
  elements: str
  sample: [192.0.2.11]
priority:
  description: VRRP's priority, higher for those that stand earlier in the list.
  returned: success
  type: int
  sample: 200
"""

import json

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.virtual_address import AddressFault, place


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "address": {"type": "str", "required": True},
            "gateways": {"type": "list", "elements": "str", "required": True},
        },
        supports_check_mode=True,
    )
    _status, shown, _error = module.run_command(["ip", "-json", "address"], check_rc=True)
    try:
        found = place(module.params["address"], module.params["gateways"], json.loads(shown))
    except AddressFault as fault:
        module.fail_json(msg=str(fault))
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
