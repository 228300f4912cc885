# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""What is wrong with the variables of the role open_webui, all at once."""

from __future__ import annotations

DOCUMENTATION = r"""
name: open_webui_faults
short_description: Return what is wrong with the variables of the role open_webui
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - Judges what types can't, for example an address without scheme, a password that is too short, a data folder inside
    the environment, or a setting that another variable owns.
  - Secrets are judged by their length and never returned.
options:
  _input:
    description: The role's variables, named without their prefix C(open_webui_).
    type: dict
    required: true
"""

EXAMPLES = r"""
- name: Refuse what can't work
  ansible.builtin.assert:
    that: (__open_webui_configuration | selfhost.lmdeploy.open_webui_faults) | length == 0
"""

RETURN = r"""
_value:
  description: One sentence for each fault, with the variable, its value and the way out. Empty when all is well.
  type: list
  elements: str
"""

from typing import TYPE_CHECKING

from ansible_collections.selfhost.lmdeploy.plugins.module_utils import open_webui

if TYPE_CHECKING:
    from collections.abc import Callable


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., list[str]]]:
        """Return the filter by its name."""
        return {"open_webui_faults": open_webui.faults}
