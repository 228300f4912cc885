# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""Where a model is found on disk: the one rule that the roles share."""

from __future__ import annotations

DOCUMENTATION = r"""
name: model_path
short_description: Return where a model is found on disk
version_added: 1.0.0
author:
  - The selfhost.lmdeploy maintainers (@selfhost)
description:
  - A model's name on a hub, C(ORG/NAME), becomes C(DIR/ORG--NAME), where the role C(model_weights) puts it.
  - An absolute path stays as it is. A plain name without a slash is a file in the models folder.
positional: directory
options:
  _input:
    description: Name of the model on the hub, an absolute path, or the name of a file in the models folder.
    type: str
    required: true
  directory:
    description: Folder of the models.
    type: str
    default: /var/lib/models
"""

EXAMPLES = r"""
- name: Show where the model is
  ansible.builtin.debug:
    msg: "{{ 'OpenGVLab/InternVL3-14B-Instruct' | selfhost.lmdeploy.model_path }}"
"""

RETURN = r"""
_value:
  description: Absolute path of the model.
  type: str
  sample: /var/lib/models/OpenGVLab--InternVL3-14B-Instruct
"""

from typing import TYPE_CHECKING

from ansible.errors import AnsibleFilterError
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import engine

if TYPE_CHECKING:
    from collections.abc import Callable


def model_path(model: str, directory: str = "/var/lib/models") -> str:
    """Return the absolute path of ``model``; the argument is a hub id, an absolute path or a plain file name."""
    try:
        return engine.model_path(model, directory)
    except engine.EngineFault as fault:
        raise AnsibleFilterError(str(fault)) from fault


class FilterModule:
    """Ansible's way in."""

    def filters(self) -> dict[str, Callable[..., str]]:
        """Return the filter by its name."""
        return {"model_path": model_path}
