# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""The engines of a host, complete, from the variables of the role api_server."""

from __future__ import annotations

DOCUMENTATION = r"""
name: engine_instances
short_description: Return the engines of a host, complete, or everything that is wrong with their variables
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Puts together what the inventory wants of a host's engines and what the host has.
  - Each instance gets its unit's name, the path of its model, its tensor parallelism, its URL, and under C(launcher)
    everything that the launcher reads, the engine's arguments among it.
  - Where the host has several GPUs each instance gets its own in C(gpus), and in C(unit_lines) what binds its unit to
    their NUMA node.
  - Fails with all faults in one message, each with its variable, its value and the way out.
positional: instances, host, settings
options:
  _input:
    description: The single instance, which is also what named instances take from when they don't say otherwise.
    type: dict
    required: true
  instances:
    description: Named instances; when there are none, the input is the one instance of the host.
    type: list
    elements: dict
    required: true
  host:
    description: What M(selfhost.lmdeploy.engine_info) returned.
    type: dict
    required: true
  settings:
    description: C(engine), C(models_dir), C(drain_seconds), C(allowed_networks), C(numa_affinity) and
      C(twin_port_offset), the same for all.
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show the arguments of the host's engines
  ansible.builtin.debug:
    msg: "{{ plain | selfhost.lmdeploy.engine_instances([], host, settings) | map(attribute='launcher.arguments') }}"
"""

RETURN = r"""
_value:
  description: The instances.
  type: list
  elements: dict
"""

from typing import TYPE_CHECKING, Any

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import engine

if TYPE_CHECKING:
    from collections.abc import Callable


def engine_instances(
    plain: dict[str, Any], instances: list[dict[str, Any]], host: dict[str, Any], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the instances of a host (see DOCUMENTATION)."""
    try:
        return engine.engine_instances(plain, instances, host, settings)
    except engine.EngineFault as fault:
        raise AnsibleFilterError(str(fault)) from fault


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., list[dict[str, Any]]]]:
        """Return the filter by its name."""
        return {"engine_instances": engine_instances}
