# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Open WebUI's environment, computed from the variables of its role."""

from __future__ import annotations

DOCUMENTATION = r"""
name: open_webui_environment
short_description: Return Open WebUI's environment for the variables of its role
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Turns the variables of the role C(open_webui) into the environment variables that Open WebUI reads.
  - Mends the addresses of connections. A slash at the end goes, and C(/v1) is added where no path is given.
  - Values are text as Open WebUI expects it, True and False as words, lists and dicts as JSON.
options:
  _input:
    description: The role's variables, named without their prefix C(open_webui_).
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Show what Open WebUI would be told
  ansible.builtin.debug:
    msg: "{{ (__open_webui_configuration | selfhost.lmdeploy.open_webui_environment).variables }}"
"""

RETURN = r"""
_value:
  description: Two dicts of names and values, C(variables) that may be shown, and C(secrets).
  type: dict
"""

from typing import TYPE_CHECKING, Any

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import open_webui

if TYPE_CHECKING:
    from collections.abc import Callable


def open_webui_environment(config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return the environment; a value that fits nowhere ends as an error that names it."""
    try:
        return open_webui.environment(config)
    except ValueError as fault:
        raise AnsibleFilterError(f"Open WebUI's environment can't be written: an address {fault}.") from fault


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., dict[str, dict[str, str]]]]:
        """Return the filter by its name."""
        return {"open_webui_environment": open_webui_environment}
