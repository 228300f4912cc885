#!/usr/bin/python
# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Have a twin of an engine on another port while the engine itself is changed."""

from __future__ import annotations

DOCUMENTATION = r"""
module: engine_twin
short_description: Have a twin of an engine on another port while the engine itself is changed
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - A twin is the release that runs, started once more on another port by a unit of its own, with the same sandbox. It
    is asked the question of the release's gate before it counts.
  - An engine that does not serve gets no twin, and neither does one that has no release yet.
  - A twin ends by itself after O(seconds), and with a boot.
options:
  instance:
    description: The engine, by the name of its unit without suffix.
    type: str
    required: true
  state:
    description: Whether there is to be a twin.
    type: str
    choices: [present, absent]
    default: present
  port_offset:
    description: What is added to the engine's port for that of its twin.
    type: int
    default: 0
  seconds:
    description: Seconds after which the twin ends by itself.
    type: float
    default: 3600
attributes:
  check_mode:
    description: Tells whether there would be a twin.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Have the engine twice
  selfhost.lmdeploy.engine_twin:
    instance: api-server
    port_offset: 1000

- name: Have it once
  selfhost.lmdeploy.engine_twin:
    instance: api-server
    state: absent
"""

RETURN = r"""
serves:
  description: Whether a twin serves now.
  returned: success
  type: bool
port:
  description: Its port, 0 where there is none.
  returned: success
  type: int
gate:
  description: What was seen when it was asked; C(seconds), C(tokens_per_second) and C(answer).
  returned: when a twin was started
  type: dict
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.engine_releases import ReleaseFault, Releases, locked
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.engine_twin import Twin, port_of


def converge(params: dict[str, Any], *, dry: bool) -> dict[str, Any]:
    """Have a twin, or none."""
    engine = Releases(params["instance"])
    twin = Twin(engine)
    wanted = params["state"] == "present" and bool(twin.release())
    if dry or not wanted:
        changed = wanted or twin.exists()
        if not dry and not wanted:
            twin.end()
        return {"changed": changed, "serves": False, "port": 0}
    port = port_of(engine) + params["port_offset"]
    with locked():
        gate = twin.have(port, params["seconds"])
    return {"changed": True, "serves": True, "port": port, "gate": gate}


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "instance": {"type": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "port_offset": {"type": "int", "default": 0},
            "seconds": {"type": "float", "default": 3600.0},
        },
        supports_check_mode=True,
    )
    try:
        result = converge(module.params, dry=module.check_mode)
    except (ReleaseFault, OSError) as fault:
        module.fail_json(msg=str(fault))
    module.exit_json(**result)


if __name__ == "__main__":
    main()
